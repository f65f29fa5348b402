"""Whether a server answers, before a library's client retries for minutes."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request

ANSWER_S = 2.2
"""A host that is reachable answers a request for headers in less time."""


def why_unreachable(url: str, answer_s: float = ANSWER_S) -> str | None:
    """Why a URL cannot be downloaded, through the proxies of the environment; None if its server answers, whatever it
    says. Returns within ``answer_s`` seconds: a resolver or proxy without a connection may block a process for longer.
    """
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            # A new opener: urlopen keeps the proxies of its first call.
            opener = urllib.request.build_opener()
            opener.open(urllib.request.Request(url, method="HEAD"), timeout=answer_s).close()
            reasons.append(None)
        except urllib.error.HTTPError:
            reasons.append(None)  # the server answers; its client knows how to log in
        except urllib.error.URLError as error:
            # The client may have other certificates.
            reasons.append(None if isinstance(error.reason, ssl.SSLError) else str(error.reason))
        except (OSError, ValueError) as error:
            reasons.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(answer_s)
    return reasons[0] if reasons else f"no answer within {answer_s:g} s"
