"""Explain a failed request to a remote store in one line with its fix, for every client library.

fsspec and the clients below it (aiohttp, botocore, google-auth, azure-core, huggingface_hub) share no base class, and
fsspec's HTTP client raises FileNotFoundError for most failures. The code therefore searches the chain of exceptions,
first for an HTTP status, then for names of exception classes. Matching by name needs no client to be installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from distgan.data.storage.locations import protocol_of, public_name
from distgan.errors import printable

_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
    "ProfileNotFound",
    "GoogleAuthError",
    "ClientAuthenticationError",
    "LocalTokenNotFoundError",
}
_TLS = {"SSLError", "ClientSSLError", "CertificateError"}
_TIMEOUTS = {"TimeoutError", "ReadTimeoutError", "ConnectTimeoutError", "Timeout", "ServiceResponseTimeoutError"}
_UNREACHABLE = {
    "ClientConnectorError",
    "EndpointConnectionError",
    "ProxyConnectionError",
    "ConnectionRefusedError",
    "gaierror",
    "ServiceRequestError",
    "NewConnectionError",
}
_BROKEN = {
    "ServerDisconnectedError",
    "ClientPayloadError",
    "ClientOSError",
    "ConnectionError",
    "ConnectionClosedError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
}
_OTHER_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
    "Moved Permanently",
}
_INVALID = {"ParamValidationError", "InvalidURL"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket, FSSPEC_S3_ANON=true",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
    "hf": "run `hf auth login`, or set HF_TOKEN",
    "http": "put them into the URL as https://USER:PASSWORD@HOST/..., or put a token into its query",
}
_ENDPOINTS = {
    "s3": "check the network and AWS_ENDPOINT_URL",
    "http": "check the host and port in the URL, and the network",
}
_FAMILIES = {"https": "http", "s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
_PACKAGES = {
    "http": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "adl": "adlfs",
    "hf": "huggingface_hub",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
    "oci": "ocifs",
    "oss": "ossfs",
}
_MOST_CHARACTERS = 300


class StoreError(OSError):
    """A failed request to a remote store. The message is the cause and the fix, without the URL.

    Args:
        status: HTTP status of the response; 404 for every missing object, None without a status.
        transient: True if the same request may succeed in a few seconds: too many requests, a failing server or a
            broken connection. A timeout is not transient.
    """

    def __init__(self, message: str, *, status: int | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.transient = transient

    @property
    def permanent(self) -> bool:
        """Return True if the same request fails until somebody changes something: a name, settings or permissions."""
        return self.status is not None and 300 <= self.status < 500 and not self.transient


def explain(url: str, error: Exception, handled: BaseException | None = None) -> StoreError:
    """The cause of an exception that fsspec or a client below it raised for a URL.

    Args:
        handled: the exception that was being handled when the request was made. Python has it among the causes.
    """
    if isinstance(error, StoreError):
        return error
    chain = list(_chain(error, handled))
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    family = family_of(url)
    if names & _NO_CREDENTIALS:
        return StoreError(f"no valid credentials ({_text(url, error)}); {_credentials(family)}", status=401)
    status = next(filter(None, map(_status, chain)), None)
    if status is None and isinstance(error, PermissionError):
        status = 403
    # The cause of an HTTP client's FileNotFoundError says more than its class.
    if status is None and isinstance(error, FileNotFoundError) and len(chain) == 1:
        return StoreError("not found; check the name", status=404)
    if status is not None and status >= 300:
        return _of_status(url, status, chain, family)
    cause = chain[-1] if isinstance(error, FileNotFoundError) else error
    text = _text(url, cause)
    if names & _INVALID:
        # Clients quote the name, which may hold a password, and the pattern that it does not match.
        said = f" ({text})" if "ParamValidationError" not in names else ""
        return StoreError(f"not a valid name for this store{said}; check the bucket or host in the URL", status=400)
    if family == "s3" and text.startswith("Invalid endpoint"):
        return StoreError(
            f"AWS_ENDPOINT_URL: {text.rpartition(': ')[2].rpartition('@')[2]!r} is no URL; give it a scheme, as in "
            "https://HOST:PORT", status=400,
        )  # fmt: skip
    if names & _TLS:
        return StoreError(f"no secure connection: {text}; check the server's certificate and the URL's protocol")
    if names & _TIMEOUTS:
        return StoreError("the server did not answer in time; try again later")
    if names & _UNREACHABLE:
        fix = _ENDPOINTS.get(family, "check the network and the endpoint in the store's settings")
        return StoreError(f"no connection: {text}; {fix}")
    if names & _BROKEN:
        return StoreError(f"the connection broke ({text}); try again later", transient=True)
    kind = type(cause).__name__
    return StoreError(text if text == kind or type(cause) is OSError else f"{kind}: {text}")


def lacks_bucket(error: BaseException) -> bool:
    """Return True if a store says that the bucket of a request does not exist."""
    return any(_code(link) in ("NoSuchBucket", "ContainerNotFound") for link in _chain(error, None))


def missing_package(url: str, error: ImportError) -> str:
    """Return the message for a missing client package of a URL's protocol."""
    package = _PACKAGES.get(family_of(url))
    install = f"run `pip install {package}`" if package else "install the package that it names"
    return f"{public_name(url)}: cannot import the package for {protocol_of(url)}://: {error}; {install}"


def family_of(url: str) -> str:
    """Return one name for all protocols of the same kind of store."""
    protocol = protocol_of(url)
    return _FAMILIES.get(protocol, protocol)


def _credentials(family: str) -> str:
    return _CREDENTIALS.get(family, "set the credentials of this store")


def _of_status(url: str, status: int, chain: list[BaseException], family: str) -> StoreError:
    code = next(filter(None, map(_code, chain)), None)
    answer = f"HTTP {status}" if code in (None, str(status)) else f"HTTP {status}, {code}"
    if status == 401:
        return StoreError(f"the server requires credentials ({answer}); {_credentials(family)}", status=status)
    if status == 403:
        fix = "check that the file exists, and that your credentials or token are valid and allow access"
        return StoreError(f"access refused ({answer}); {fix}", status=status)
    if status in (404, 410):
        return StoreError(f"not found ({answer}); check the name", status=404)
    if status == 429:
        fix = "try again later, or use fewer processes"
        return StoreError(f"too many requests ({answer}); {fix}", status=status, transient=True)
    if status >= 500 or status == 408:
        fix = "try again later, or ask the server's operator"
        return StoreError(f"the server failed ({answer}); {fix}", status=status, transient=True)
    # The client finds out the region by itself, unless a setting names one.
    other = family == "s3" and ("Region" in str(code) or code in _OTHER_REGION)
    fix = "set AWS_DEFAULT_REGION to the region of the bucket" if other else "check the URL"
    return StoreError(f"the server answered {answer}: {_text(url, chain[-1])}; {fix}", status=status)


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """The exception and its causes, outermost first, up to one that was there before."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and link is not handled and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of a client's exception, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        candidates = (getattr(error, name, None) for name in ("status", "status_code", "code"))
        found = next((value for value in candidates if value is not None), getattr(response, "status_code", None))
    text = str(found)
    return int(text) if text.isdecimal() and 100 <= int(text) < 600 else None


def _code(error: BaseException) -> str | None:
    """Return the store's error code, such as `NoSuchBucket`, or None."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code) if code else None


def _text(url: str, error: BaseException) -> str:
    """Return an exception's message in one line, without possible secrets in URLs."""
    text = " ".join(str(error).split()).replace(url, public_name(url))
    text = re.sub(r"https?://[^\s'\">]+", lambda match: public_name(match[0]), text)
    shown = printable(text)[:_MOST_CHARACTERS]
    return shown.rstrip(".") or type(error).__name__
