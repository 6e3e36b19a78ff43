"""An object store given by its URL: S3, Google Cloud Storage or Azure, or a compatible one.

    bucket = Bucket.at("s3://lab/kdb")
    bucket.put_new("commits/1f0c.json", content)

Credentials are found as by each vendor's own tools (the environment, ``~/.aws``, a role of the machine), and stay in
memory. The server's own error messages are not shown, because they can contain the name of the key.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from kdb.errors import WarehouseError

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")

Result = TypeVar("Result")

_AT_ONCE = 16
"""Maximum number of concurrent requests."""

_PATIENCE = timedelta(seconds=30)
"""Maximum time from the first attempt of a request to the last."""

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")

_MAKE_IT = "there is no such bucket. Create it first, or name another with --warehouse."


def is_url(location: object) -> bool:
    """Whether a warehouse's location is the URL of an object store, not a folder."""
    return "://" in str(location)


@dataclass(frozen=True)
class ListedObject:
    """An object in a listing; ``tag`` changes with its content."""

    path: str
    tag: str


class Bucket:
    """The objects under one URL. All methods raise WarehouseError if the store refuses or cannot be reached."""

    def __init__(self, store: ObjectStore, url: str) -> None:
        self.store, self.url = store, url

    @classmethod
    def at(cls, url: str) -> Bucket:
        """Return the objects under ``url``. Raises WarehouseError for an unknown URL, or if its library is missing."""
        url = url.rstrip("/")
        scheme, _, rest = url.partition("://")
        if "@" in rest.partition("/")[0]:
            raise WarehouseError(
                "The URL contains credentials. Remove them: kdb finds credentials as the vendor's own tools do."
            )
        if scheme not in SCHEMES or not rest.strip("/"):
            known = ", ".join(f"{known}://BUCKET/PREFIX" for known in SCHEMES)
            raise WarehouseError(f"{url!r} is not a location of a warehouse. Name a folder, or one of {known}.")
        try:
            from obstore.store import from_url
        except ImportError:
            raise WarehouseError(
                f"{url!r} needs a library that is not installed. Run: pip install 'kdb-lm[cloud]'."
            ) from None
        options: dict[str, Any] = _s3_options() if scheme == "s3" else {}
        with _reported(url):
            store = from_url(
                url,
                client_options={"connect_timeout": "10s", "timeout": "2m", "allow_http": True},
                retry_config={"max_retries": 5, "retry_timeout": _PATIENCE},
                **options,
            )
        return cls(store, url)

    def get(self, path: str) -> bytes | None:
        """Return the content of an object; None if it does not exist."""
        import obstore

        with _reported(self.url):
            try:
                return bytes(obstore.get(self.store, path).bytes())
            except FileNotFoundError as error:
                _refuse_missing_bucket(self.url, error)
                return None

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield the content of an object in chunks. Raises FileNotFoundError if it does not exist."""
        import obstore

        with _reported(self.url):
            for chunk in obstore.get(self.store, path).stream(min_chunk_size=8 * 2**20):
                yield bytes(chunk)

    def range(self, path: str, start: int, end: int) -> bytes:
        """Return bytes ``start`` to ``end`` of an object. Raises FileNotFoundError if it does not exist."""
        import obstore

        with _reported(self.url):
            return bytes(obstore.get_range(self.store, path, start=start, end=end))

    def upload(self, path: str, file: Path) -> None:
        """Write a file's content as an object."""
        import obstore

        with _reported(self.url):
            obstore.put(self.store, path, file)

    def put_new(self, path: str, content: bytes) -> bool:
        """Write an object atomically unless it exists; return whether it was written."""
        import obstore

        with _reported(self.url):
            try:
                obstore.put(self.store, path, content, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def put_over(self, path: str, content: bytes, expected: Callable[[bytes], bool]) -> bool:
        """Replace an object atomically if it has the expected content; return whether it was replaced."""
        import obstore

        with _reported(self.url):
            try:
                response = obstore.get(self.store, path)
                if not expected(bytes(response.bytes())):
                    return False
                # Google's store compares the version, the others the tag.
                version = {key: response.meta[key] for key in ("e_tag", "version") if response.meta[key]}
                obstore.put(self.store, path, content, mode=cast("UpdateVersion", version), use_multipart=False)
            except (obstore.exceptions.PreconditionError, FileNotFoundError):
                return False
        return True

    def list(self, prefix: str) -> list[ListedObject]:
        """Return all objects under a prefix, in order of their paths."""
        import obstore

        with _reported(self.url):
            objects = [one for page in obstore.list(self.store, prefix) for one in page]
        return sorted((ListedObject(one["path"], one["e_tag"] or "") for one in objects), key=lambda one: one.path)

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects, ignoring those that no longer exist."""
        import obstore

        with _reported(self.url), contextlib.suppress(FileNotFoundError):
            if paths:
                obstore.delete(self.store, list(paths))


def concurrently(request: Callable[..., Result], *arguments: Iterable[Any]) -> list[Result]:
    """Return the results of a request for each argument, in order; the first error stops it."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(request, *arguments))


def _s3_options() -> dict[str, Any]:
    """Return credentials as boto3 finds them; without any, requests are not signed, which public buckets accept."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise WarehouseError("s3:// needs a library that is not installed. Run: pip install 'kdb-lm[cloud]'.") from None
    try:
        return {"config": config, "credential_provider": Boto3CredentialProvider()}
    except ValueError:
        return {"config": {**config, "skip_signature": True}}
    except BotoCoreError as error:  # such as a profile that is not in ~/.aws
        raise WarehouseError(f"The AWS credentials cannot be read: {error}.") from error


@contextlib.contextmanager
def _reported(url: str) -> Iterator[None]:
    """Convert errors of the store into WarehouseError, except a missing object, which callers handle."""
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        _refuse_missing_bucket(url, error)
        raise
    except (BaseError, OSError) as error:
        raise WarehouseError(f"{url}: {_why(str(error))}") from None  # its cause may contain the name of the key


def _refuse_missing_bucket(url: str, error: Exception) -> None:
    if any(sign in str(error) for sign in _NO_BUCKET):
        raise WarehouseError(f"{url}: {_MAKE_IT}") from None


def _why(error_text: str) -> str:
    """Return what an error of the store means, and what to do."""
    code = "".join(re.findall(r"<Code>(\w+)</Code>", error_text)[:1])
    status = "".join(re.findall(r"status code: (\d{3})", error_text)[:1])
    detail = f" ({' '.join(filter(None, (status, code)))})" if status or code else ""
    if any(sign in error_text for sign in _NO_BUCKET):
        return _MAKE_IT
    if status in ("401", "403") or "credential" in error_text.lower():
        return (
            f"permission denied{detail}. Check the credentials that the vendor's own tools use, and their permissions."
        )
    if not status:
        return (
            "the store cannot be reached, or the connection was lost. Run the same command again to resume. (For your "
            "own store, set AWS_ENDPOINT_URL to its address.)"
        )
    return f"the store refused the request{detail}. Run the same command again to resume."
