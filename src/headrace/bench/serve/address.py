"""Where a server is, from a URL."""

import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from headrace.errors import ConfigError

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Address:
    """path: what stands before /v1 in the URLs of the API, empty or beginning with a slash."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Takes URLs with and without the /v1 that OpenAI's clients want in theirs.

        Raises:
            ConfigError: no URL of a server.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url is '{url}': {error}") from None
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ConfigError(f"--base-url is '{url}'; give one such as http://127.0.0.1:8000")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(f"--base-url is '{url}'; it must have no user, query or fragment (use --api-key)")
        if any(not 0x20 < ord(character) < 0x7F for character in url):
            raise ConfigError(f"--base-url is '{url}'; it must be plain ASCII without spaces")
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.scheme, parts.hostname, _PORTS[parts.scheme] if port is None else port, path)

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def ssl_context(self, *, verify: bool) -> ssl.SSLContext | None:
        if self.scheme != "https":
            return None
        context = ssl.create_default_context()
        if not verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}{self.path}"
