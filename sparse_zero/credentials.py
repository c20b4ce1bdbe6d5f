"""Does a text hold what must not be written down: an access token, a password in an address, a signed address?"""

import re
from collections.abc import Mapping
from typing import Any

REMOVED = "(credential removed)"
# Tokens by the forms that their services give them: of the Hugging Face hub, GitHub, GitLab, OpenAI and its like, AWS,
# Slack; then addresses with a password, or with a key or a signature in their query.
_CREDENTIAL = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}"
    r"|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{15,}"
    r"|(?<![\w/])sk-[\w-]{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bxox[abeoprs]-[\w-]{10,}"
    r"|\b[a-z][a-z0-9+.-]{0,30}://[^/\s@]*:[^/\s@]+@"
    r"|[?&](?:token|access_token|api_key|apikey|key|password|secret|sig|signature|x-amz-signature|x-goog-signature)="
    r"[^&\s]+",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|PASSWORD|SECRET|API_?KEY|ACCESS_KEY)(?:_|$)", re.IGNORECASE)


def is_secret(name: str, value: str) -> bool:
    """Whether an environment variable holds a secret, by a word of its name (API_TOKEN) or by the form of its value."""
    return bool(_SECRET_NAME.search(name) or _CREDENTIAL.search(value))


def find_credential(value: Any, path: tuple[str, ...] = ()) -> str | None:
    """Where in JSON values the first credential is, as a dotted path; None: there is none. Keys are looked at too."""
    if isinstance(value, str):
        return (".".join(path) or "the value") if _CREDENTIAL.search(value) else None
    inside: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        for key in value:
            if _CREDENTIAL.search(str(key)):
                return ".".join((*path, REMOVED))
        inside = [(str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(str(number), each) for number, each in enumerate(value)]
    return next((found for key, each in inside if (found := find_credential(each, (*path, key))) is not None), None)


def without_credentials(value: Any) -> Any:
    """JSON values with every credential replaced by :data:`REMOVED`; what stands around it in a text stays."""
    if isinstance(value, str):
        return _CREDENTIAL.sub(REMOVED, value)
    if isinstance(value, Mapping):
        return {without_credentials(str(key)): without_credentials(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(each) for each in value]
    return value
