"""Who asks: somebody at this machine, or a stranger. The address that the page listens on does not tell, for a proxy of this machine may
pass on what comes from anywhere. No Gradio.
"""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

_PASSED_ON = ("x-forwarded", "forwarded", "x-real-ip", "via", "cf-connecting-ip", "true-client-ip")  # how their headers begin


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address stands for this machine itself."""
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return (host or "").lower() == "localhost"


def is_at_this_machine(request: Any) -> bool:
    """Whether a request comes from a browser on this machine. In doubt it does not.

    A proxy shows itself by a header that it adds, a path under which the page lies, HTTP/1.0, or by the address in the browser: as `Host`
    or, where it is not passed on, as `Origin` or `Referer`. One that shows nothing of this cannot be told from a browser, which is why
    `docs/demo.md` has such pages started with `--no-allow-fetch`.

    Args:
        request: Gradio's or Starlette's; None if there is none.
    """
    if request is None:
        return False
    headers = {name.lower(): value for name, value in dict(request.headers).items()}
    if any(name.startswith(_PASSED_ON) for name in headers):
        return False
    scope = getattr(getattr(request, "request", None) or request, "scope", {})
    if os.environ.get("GRADIO_ROOT_PATH") or str(scope.get("root_path", "")).strip("/") or scope.get("http_version") == "1.0":
        return False
    client = scope.get("client")
    if client and not is_loopback(client[0]):
        return False
    seen = [f"//{headers.get('host', '')}", *(headers[name] for name in ("origin", "referer") if name in headers)]
    return all(is_loopback(_host_of(address)) for address in seen)


def _host_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:  # no address
        return None
