"""PolyServe (arXiv 2507.17769): requests of one TPOT share workers, packed as full as that TPOT allows.

By the paper as summarised; not checked against the authors' source. Simplified: bins are the limits themselves, a
worker belongs to the tightest limit that was placed there since it was empty (no view tells what a worker's requests
want), and workers are not scaled. Only decode is placed so; a worker that does both is the default's choice.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from minidisagg.core.messages import Role
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, RequestView


class PolyServe(Policy):
    """The most loaded worker that still attains: of the request's bin, an empty one, or a tighter one."""

    def __init__(self, tpot: float = 0.0) -> None:
        """`tpot`: seconds per token of requests that have no limit of their own; 0: none, they go to the emptiest."""
        super().__init__()
        if not isinstance(tpot, int | float) or not 0 <= tpot < inf:
            raise ValueError(f"polyserve: tpot must be seconds, at least 0, not {tpot}")
        self.tpot, self._bins = tpot, dict[str, float]()

    def place(self, request: RequestView, cluster: ClusterView) -> Placement | Reject:
        """Where nothing attains, or nothing is known of steps yet, the default: the least loaded."""
        placement = super().place(request, cluster)
        if isinstance(placement, Reject) or placement.decode in (None, placement.prefill):
            return placement
        slo, decode = request.slo_tpot or self.tpot or inf, cluster.candidates(Role.DECODE)
        bins = {w.name: self._bins.get(w.name, 0.0) if w.decoding else 0.0 for w in decode}  # 0: empty
        took = {w.name: cluster.t_decode(w, 1, request.prefill_len) for w in decode}
        for mine in (slo,), (0.0,), sorted({b for b in bins.values() if 0 < b < slo}, reverse=True):
            attains = [n for n in took if bins[n] in mine and 0 < took[n] <= min(slo, bins[n] or inf)]
            if attains and slo < inf:
                placement = replace(placement, decode=max(attains, key=lambda name: took[name]))
                break
        chosen = placement.decode or ""
        self._bins[chosen] = min(slo, bins.get(chosen) or inf)
        return placement


POLICY = PolyServe
