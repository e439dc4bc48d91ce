"""EB+ (Zhang et al., "Threshold-Based Exclusive Batching for LLM Inference", ICML'26, arXiv 2606.00516).

Checked against weifang231/eb-vllm vllm/v1/core/sched/scheduler.py (`_evaluate_mode_switch`, `_compute_optimal_ratio`).
In exclusive mode decodes run alone until a share `theta` of the places in the batch is free, then prompts do until it
is full. With the costs that a worker has learnt (`fixed` seconds of a step, more for each token of a prompt and each
decode), and the mean lengths of what is there:

    theta / (1 - theta) + ln(1 - theta) = 1 / output
    exclusive if  extra * places * (token * prompt + decode * output) > fixed * ((1 - ln(1 - theta) * output) / theta
                                                                                 - 1 - output)

`extra`, what a token costs more in a mixed step, these costs cannot tell: it is a setting (there: fitted to a sweep of
kernels). All steps have the same fixed cost here, there each kind its own. Output lengths are the predictor's, else the
limits (there: learnt). Left out: hazard rates that grow, hysteresis, and the memory-safe number of places, since a
prompt has all its pages before it begins.
"""

from __future__ import annotations

import math

from minidisagg.core.policy import Batch, Policy, WorkerView


class EbPlus(Policy):
    """Mixed steps are those of `fcfs`."""

    only = "colocated"
    equal_steps = True

    def __init__(self, extra: float = 0.2) -> None:
        """`extra`: share by which a token costs more in a mixed step than in one of its kind; 0: never exclusive."""
        super().__init__()
        if not isinstance(extra, int | float) or not 0 <= extra < math.inf:
            raise ValueError(f"eb_plus: extra must be a share, at least 0, not {extra}")
        self.extra = extra
        self._refill = False

    def compose(self, batch: Batch, worker: WorkerView) -> None:
        """Where there is a choice, the crossover decides."""
        prompts = [r for r in (*batch.running, *batch.waiting) if r.is_prefill]
        places = (*batch.running, *batch.waiting)[: worker.options.max_num_seqs]
        output = sum(r.predicted_len or r.max_tokens for r in places) / max(1, len(places))
        prompt = sum(r.prefill_len for r in places) / max(1, len(places))
        if not prompts or not self._exclusive(len(places), prompt, output, worker):
            self._refill = False
            super().compose(batch, worker)
            return
        decodes = sum(not r.is_prefill for r in batch.running)
        begun = len(batch.running) > decodes
        enough = max(1, int(threshold(output) * len(places)))
        self._refill = self._refill or begun or len(places) - decodes >= enough
        for request in prompts if self._refill else ():
            if not batch.add(request):
                break
        if batch.empty:
            self._refill = False
            for request in batch.running:
                batch.add(request)

    def _exclusive(self, places: int, prompt: float, output: float, worker: WorkerView) -> bool:
        predict, theta = worker.costs.predict, threshold(output)
        fixed = predict()
        token, decode = predict(1, 0, 1) - fixed, predict(0, 1, int(prompt + output / 2)) - fixed
        idle = (1 - math.log(1 - theta) * output) / theta - 1 - output
        return self.extra * places * (token * prompt + decode * output) > fixed * idle


def threshold(output: float) -> float:
    """The share of free places, by bisection: the left side of its equation grows with it."""
    low, high = 0.0, 1.0
    for _ in range(30):
        theta = (low + high) / 2
        if theta / (1 - theta) + math.log(1 - theta) < 1 / output:
            low = theta
        else:
            high = theta
    return (low + high) / 2


POLICY = EbPlus
