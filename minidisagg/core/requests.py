"""The requests that are on a worker, and those that are over there."""

from __future__ import annotations

from collections import OrderedDict

from minidisagg.core.blocks import IntegrityError
from minidisagg.core.plan import SeqKey
from minidisagg.core.request import Request

FENCED = 65536  # requests that are over whose incarnation is still remembered


class Requests(dict[SeqKey, Request]):
    """By request id and incarnation; filled and emptied by `add` and `remove` alone."""

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[str, list[Request]] = {}  # the incarnations of each request; seldom more than one
        self._over: OrderedDict[str, int] = OrderedDict()  # highest incarnation that is over, or was aborted

    def add(self, request: Request) -> None:
        """It is here."""
        self[request.key] = request
        self._of.setdefault(request.request_id, []).append(request)

    def remove(self, request: Request) -> None:
        """It is over."""
        del self[request.key]
        others = self._of[request.request_id]
        others.remove(request)
        if not others:
            del self._of[request.request_id]
        self.close(*request.key)

    def of(self, request_id: str) -> list[Request]:
        """Its incarnations that are here."""
        return self._of.get(request_id, [])[:]

    def close(self, request_id: str, incarnation: int) -> None:
        """Remember that this incarnation is over, so that a late message cannot revive it."""
        self._over[request_id] = max(incarnation, self._over.pop(request_id, -1))
        if len(self._over) > FENCED:
            self._over.popitem(last=False)

    def is_over(self, request_id: str, incarnation: int) -> bool:
        """This incarnation, or a later one, has been closed."""
        return incarnation <= self._over.get(request_id, -1)

    def check_integrity(self) -> None:
        """Both accounts say the same."""
        if sum(map(len, self._of.values())) != len(self):
            raise IntegrityError("requests and their incarnations disagree")
