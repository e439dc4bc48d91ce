"""Where a server is, written and read: an IPv6 address has colons of its own, and stands in brackets in a URL."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_BARE_IPV6 = re.compile(r"(https?://)([0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f.]*?)(?::\d+)?(?:/|$)")


def at(host: str, port: int | str) -> str:
    """`host:port`, as URLs and errors have it. What names a link's interface is escaped, as RFC 6874 wants it."""
    return f"[{host.replace('%', '%25')}]:{port}" if ":" in host else f"{host}:{port}"


def server_url(host: str, port: int | str) -> str:
    """The address that a client is given, without /v1."""
    return f"http://{at(host, port)}"


def bare(host: str) -> str:
    """A host as sockets take it, whether or not it was written as in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def parse_server_url(text: str) -> str:
    """`http://HOST:PORT[/PATH]`; a /v1 at its end, as OpenAI's clients have it, is left out. Raises ValueError."""
    url = text.rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        valid = valid and re.fullmatch(r"[^\[\]]*(\[[^\[\]]+\])?(:\d*)?", parts.netloc) is not None
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        hint = "; an IPv6 address stands in brackets: http://[::1]:8000" if _BARE_IPV6.match(text) else ""
        raise ValueError(f"expected a URL such as http://127.0.0.1:8000{hint}")
    return url
