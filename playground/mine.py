"""Yours to change: Ctrl+Enter runs it as side B."""

from minidisagg import Placement, Policy, Reject, Role

AGING = 500  # prompt tokens: what a second counts


class Mine(Policy):
    """Short prompts first, each where it is done soonest.

    What is not here keeps its default, first come, first
    served. The other hooks are admit, replace, rebalance,
    which the router asks, and accept, compose and evict,
    which a worker asks.
    """

    def place(self, request, cluster):
        """Which worker prefills it, and which one decodes?"""
        prefill = cluster.candidates(Role.PREFILL)
        decode = cluster.candidates(Role.DECODE)
        if not prefill or not decode:
            return Reject(1.0, "no worker takes it")

        tokens = request.prefill_len

        def until_prefilled(w):  # seconds, by its last steps
            return cluster.t_prefill(tokens, w), w.decoding

        def step_with_it(w):
            return cluster.t_decode(w, 1, tokens), w.decoding

        first = min(prefill, key=until_prefilled)
        if first.takes(Role.DECODE):  # colocated
            return Placement(first.name, first.name)
        then = min(decode, key=step_with_it)
        return Placement(first.name, then.name)

    def order(self, request, stage, worker):
        """A worker's sort key: the smallest goes first."""
        if stage != "prefill":
            return request.arrival
        # Later is longer, so that nobody waits for ever.
        return request.prefill_len + AGING * request.arrival
