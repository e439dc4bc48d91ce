"""First come, first served: the defaults of `Policy`. Whole prompts are fused with the running decodes."""

from minidisagg.core.policy import Policy


class Fcfs(Policy):
    """Every hook at its default."""


POLICY = Fcfs
