"""minidisagg: a compact engine to understand, measure and improve disaggregated LLM inference.

    from minidisagg import LLM, SamplingParams, Policy

Importing the package is cheap: torch is imported by the worker processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minidisagg.core.costs import StepCosts
from minidisagg.core.messages import Role, SamplingParams
from minidisagg.core.policy import (
    Batch,
    Change,
    ClusterView,
    Hits,
    Migration,
    Placement,
    Policy,
    Reject,
    Replica,
    RequestView,
    RoleChange,
    Stage,
    Victim,
    Work,
    WorkerOptions,
    WorkerStatus,
    WorkerView,
)

if TYPE_CHECKING:
    from minidisagg.runtime.llm import LLM

__all__ = [
    "LLM",
    "Batch",
    "Change",
    "ClusterView",
    "Hits",
    "Migration",
    "Placement",
    "Policy",
    "Reject",
    "Replica",
    "RequestView",
    "Role",
    "RoleChange",
    "SamplingParams",
    "Stage",
    "StepCosts",
    "Victim",
    "Work",
    "WorkerOptions",
    "WorkerStatus",
    "WorkerView",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from minidisagg.runtime.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
