"""Stand-in for Cloud Storage and S3: an HTTP server in a thread.

    python tests/helpers/buckets.py DIRECTORY DELAY

The command prints the environment variables for clients as JSON, and serves the
directory until the process is terminated.
"""

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

UPLOADING = ".uploading"  # file that holds an object until its upload is complete


class Bucket(ThreadingHTTPServer):
    """Server of the files below a directory, as ``gs://bucket/...`` or ``s3://...``.

    Args:
      root: directory with the objects.

    Attributes:
      delay: seconds before each answer.
      failures: HTTP statuses of the next answers, one status per answer.
      statuses: {piece: HTTP status}. A request gets the status if its key, or the
        prefix that it lists, contains the piece.
      truncations_left: number of the next downloads whose bodies are cut in half. Each
        of these downloads subtracts 1.
      read_only: refuse uploads, copies and deletions with 403.
      generation: version number of objects that were not written through the server.
        Each write of an object adds 1 to its version number.
      writes: {key: number of writes}.
      requests: (method, key, range header) of all requests.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.delay, self.truncations_left = Path(root), 0.0, 0
        self.failures: list[int] = []
        self.statuses: dict[str, int] = {}
        self.read_only, self.generation = False, 1
        self.writes: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """Address for TENSORSTORE_GCS_HTTP_URL and AWS_ENDPOINT_URL."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make clients use this server."""
        return {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "STORAGE_EMULATOR_HOST": self.url,
            # By default, gcsfs asks another service for the type of the bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GCS_TOKEN": "anon",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
        }

    def on_answer(self, change: int) -> None:
        """Hook for tests: called with 1 before and with -1 after each delay."""

    def keys(self, prefix: str = "") -> list[str]:
        """Return the sorted keys that start with a prefix."""
        files = (path for path in self.root.rglob("*") if path.is_file())
        names = (path.relative_to(self.root).as_posix() for path in files)
        return sorted(n for n in names if n.startswith(prefix) and n != UPLOADING)

    def version(self, key: str) -> int:
        """Return the version number of an object; 0 if it does not exist."""
        exists = (self.root / key).is_file()
        return self.generation + self.writes[key] if exists else 0

    def write(self, key: str, data: bytes) -> None:
        """Write an object."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.root / UPLOADING
        temporary.write_bytes(data)
        temporary.replace(path)
        self.writes[key] += 1

    def delete(self, key: str) -> None:
        """Delete an object, and the directories that are then empty."""
        path = self.root / key
        path.unlink(missing_ok=True)
        while path.parent != self.root and not any(path.parent.iterdir()):
            path = path.parent
            path.rmdir()

    def reads(self, piece: str) -> int:
        """Return the number of GET requests whose key contains a piece."""
        return sum(m == "GET" and piece in key for m, key, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    """Handler of one connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    server: Bucket

    def log_message(self, *_):
        """Log nothing."""

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def do_DELETE(self):
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        bucket, url = self.server, urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        # Google has paths /storage/v1/b/BUCKET/o/KEY, S3 has paths /BUCKET/KEY.
        is_upload = url.path.startswith("/upload/")
        path = url.path.removeprefix("/upload").removeprefix("/download")
        is_google = path.startswith("/storage/v1/b/")
        source, action, target = re.match(
            "(.*?)(?:/(rewriteTo/b/[^/]*|moveTo)/o/(.*))?$", path
        ).groups("")
        parts = source.strip("/").split("/")[3 if is_google else 0 :]
        key = unquote("/".join(parts[2 if is_google else 1 :]))
        if is_upload:
            key, body = _parse_upload(query, body)
        with bucket.lock:
            bucket.requests.append((method, key, self.headers.get("Range", "")))
            failure = bucket.failures.pop(0) if bucket.failures else 0
        bucket.on_answer(1)
        time.sleep(bucket.delay)
        bucket.on_answer(-1)
        for piece, status in bucket.statuses.items():
            failure = status if piece in (key or query.get("prefix", "")) else failure
        if failure:
            self._send(failure, b"refused")
        elif query.get("uploadType") == "resumable":
            # The client sends the data in a PUT to the address below.
            query["uploadType"] = "data"
            address = f"{bucket.url}{url.path}?{urlencode(query)}"
            self._send(200, b"", {"Location": address})
        elif method in ("POST", "PUT", "DELETE"):
            if action == "moveTo":
                method = "MOVE"
            self._change(method, key, unquote(target), query, body)
        elif is_google and len(parts) == 1:
            self._send(200, json.dumps({"name": parts[0]}).encode())
        elif not key:
            with bucket.lock:
                self._list(query)
        elif not bucket.version(key):
            self._send(404, b"not found")
        elif is_google and query.get("alt") != "media":
            self._send(200, json.dumps(self._metadata(key)).encode())
        else:
            self._send_object(key)

    def _change(
        self, method: str, key: str, target: str, query: dict[str, str], body: bytes
    ) -> None:
        """Write, copy, move or delete an object.

        Refuse if its version is not the one that the query requires.
        """
        bucket = self.server
        with bucket.lock:
            expected = query.get("ifGenerationMatch", str(bucket.version(key)))
            if bucket.read_only:
                status = 403
            elif expected != str(bucket.version(key)):
                status = 412
            elif (target or method == "DELETE") and not bucket.version(key):
                status = 404
            elif method == "DELETE":
                bucket.delete(key)
                status = 204
            else:
                body = (bucket.root / key).read_bytes() if target else body
                bucket.write(target or key, body)
                if method == "MOVE":
                    bucket.delete(key)
                status = 200
            answer = self._metadata(target or key) if status == 200 else {}
        answer |= {"done": True} if target else {}
        text = b"" if status == 204 else json.dumps(answer).encode()
        self._send(status, text, {"ETag": '"1"'} if method == "PUT" else None)

    def _metadata(self, key: str) -> dict[str, str]:
        size = (self.server.root / key).stat().st_size
        generation = str(self.server.version(key))
        return {"name": key, "size": str(size), "generation": generation}

    def _list(self, query: dict[str, str]) -> None:
        prefix, prefixes = query.get("prefix", ""), set()
        keys = self.server.keys(prefix)
        keys = [key for key in keys if key >= query.get("startOffset", "")]
        if end := query.get("endOffset"):
            keys = [key for key in keys if key < end]
        if "delimiter" in query:
            nested = {key for key in keys if "/" in key[len(prefix) :]}
            prefixes = {key[: key.index("/", len(prefix)) + 1] for key in nested}
            keys = [key for key in keys if key not in nested]
        if "list-type" in query:
            items = "".join(
                f"<Contents><Key>{escape(k)}</Key></Contents>" for k in keys
            )
            text = f"<ListBucketResult><KeyCount>{len(keys)}</KeyCount>{items}"
            self._send(200, f"{text}</ListBucketResult>".encode())
        else:
            items = [self._metadata(key) for key in keys]
            answer = {"items": items, "prefixes": sorted(prefixes)}
            self._send(200, json.dumps(answer).encode())

    def _send_object(self, key: str) -> None:
        path = self.server.root / key
        size, version = path.stat().st_size, str(self.server.version(key))
        headers = {"x-goog-generation": version, "ETag": f'"{version}"'}
        byte_range = self.headers.get("Range", "")
        if not byte_range:
            self._send(200, path.read_bytes(), headers)
            return
        first, _, last = byte_range.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            self._send(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as file:
            file.seek(start)
            self._send(206, file.read(stop - start), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with self.server.lock:
            # Of the answers to GET, only those of `_send_object` have these properties.
            is_download = self.command == "GET" and status in (200, 206) and headers
            is_cut = is_download and self.server.truncations_left > 0
            self.server.truncations_left -= bool(is_cut)
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = self.close_connection or bool(is_cut)


def _parse_upload(query: dict[str, str], body: bytes) -> tuple[str, bytes]:
    """Return (key, data) of an upload.

    The key is in the query, or in the first of two parts of the body.
    """
    if "name" in query:
        return query["name"], body
    boundary, _, rest = body.partition(b"\n")
    metadata, data = (
        part.partition(b"\n\n")[2] for part in rest.split(b"\n" + boundary)[:2]
    )
    return json.loads(metadata)["name"], data


@contextmanager
def serve(root: Path) -> Iterator[Bucket]:
    """Serve a directory to clients in this process.

    The clients that `storage` opens retry after milliseconds instead of seconds.
    """
    import pytest  # here, because benchmarks run this file without pytest

    from hivit_jax.data import storage

    retries = {"max_retries": 3, "initial_delay": "1ms", "max_delay": "10ms"}
    with Bucket(root) as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        patch.setattr(storage, "RETRIES", retries)
        storage._open_store.cache_clear()
        threading.Thread(target=bucket.serve_forever, args=(0.02,)).start()
        yield bucket
        bucket.shutdown()
    storage._open_store.cache_clear()


def main(root: str, delay: str) -> None:
    """Serve a directory, with `delay` seconds before each answer."""
    bucket = Bucket(Path(root))
    bucket.delay = float(delay)
    print(json.dumps(bucket.environment), flush=True)
    bucket.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
