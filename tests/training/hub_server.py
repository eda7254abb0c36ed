"""A stand-in of the Hugging Face Hub's HTTP API on the loopback: one repository, its commits in memory.

It is the model `me/model` and the data set `me/data`.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"


class Hub:
    """The repository, and what goes wrong with requests for it."""

    def __init__(self):
        self.commits: list[dict[str, bytes]] = []
        self.uploads: dict[str, bytes] = {}
        self.status: int | None = None
        """Answer every request with this status."""
        self.truncate = False
        """Send half of a file, and hang up."""
        self.claimed_size: int | None = None
        self.asked: list[str] = []

    def commit_of(self, revision: str) -> int | None:
        if revision == "main":
            return len(self.commits) - 1 if self.commits else None
        known = [number for number in range(len(self.commits)) if name_of(number) == revision]
        return known[0] if known else None


def name_of(commit: int) -> str:
    """Return the hash of a commit."""
    return hashlib.sha1(str(commit).encode()).hexdigest()


@contextlib.contextmanager
def serve(hub):
    """Serve a hub; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def answer(self, status, value=None, headers=None):
            content = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
            self.send_response(status)
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def file(self):
            if self.path.startswith("/api/datasets/me/data/"):
                return self.listing()
            match = re.fullmatch(r"(?:/me/model|/datasets/me/data)/resolve/([^/]+)/([^?]+)", self.path)
            if not match:
                return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            commit = hub.commit_of(match[1])
            if commit is None:
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            content = hub.commits[commit].get(match[2])
            if content is None:
                return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", name_of(commit))
            self.send_header("Content-Length", str(hub.claimed_size or len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: len(content) // 2] if hub.truncate else content)
            return None

        def listing(self):
            kind, revision = re.match(r"/api/datasets/me/data/(\w+)/([^/?]+)", self.path).groups()
            commit = hub.commit_of(revision)
            if commit is None:
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            if kind == "revision":
                return self.answer(200, {"id": "me/data", "sha": name_of(commit)})
            files = hub.commits[commit].items()
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files
            ]
            return self.answer(200, entries)

        def body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_one(self):
            hub.asked.append(f"{self.command} {self.path}")
            body = self.body()
            if hub.status:
                return self.answer(hub.status)
            if self.command in ("GET", "HEAD"):
                return self.file()
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.command == "PUT":
                hub.uploads[self.path.rpartition("/")[2]] = body
                return self.answer(200)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401)
            url = f"http://{self.headers['Host']}"
            if self.path == "/api/repos/create":
                return self.answer(200, {"url": f"{url}/me/model"})
            if "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "shouldIgnore": False, "uploadMode": mode_of(file["path"])}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{url}/upload/{entry['oid']}", "header": {}}}}
                    for entry in json.loads(body)["objects"]
                ]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            if "/commit/" in self.path:
                files = dict(hub.commits[-1]) if hub.commits else {}
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = hub.uploads[value["oid"]]
                hub.commits.append(files)
                commit = name_of(len(hub.commits) - 1)
                answer = {"commitUrl": f"{url}/me/model/commit/{commit}", "commitOid": commit, "hookOutput": ""}
                return self.answer(200, answer)
            return self.answer(404)

        do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def mode_of(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"
