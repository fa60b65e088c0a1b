"""Bases and data that come from the Hugging Face hub, fetched by its own libraries from a server on this machine.

The server speaks the few paths of the hub's HTTP interface that `snapshot_download` and `load_dataset` use, over
folders; nothing of those libraries is replaced. HF_ENDPOINT is how they find it, as they find a mirror.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import finetune.assets

ROOT = Path(__file__).parents[1]
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories under `root`/models and `root`/datasets, one commit each; `closed` ones ask for consent."""

    protocol_version = "HTTP/1.1"
    root: Path
    closed = "org/closed"

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in ("models", "datasets"):
            self.describe(self.root / parts[1] / parts[2] / parts[3], "/".join(parts[2:4]), parts[4:])
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if len(parts) > 4 and parts[2] == "resolve":
            self.file(self.root / kind / parts[0] / parts[1], "/".join(parts[4:]))
        else:
            self.answer(b"{}", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.do_GET()

    def describe(self, folder: Path, name: str, rest: list[str]) -> None:
        """What a repository is, or what lies in it."""
        if not folder.is_dir():
            return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        entries = [
            {"type": "file", "path": path, "size": file.stat().st_size, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path, file in files.items()
        ]
        if rest[:1] == ["tree"]:
            inside = [entry for entry in entries if str(entry["path"]).startswith("/".join(rest[2:]))]
            return self.json(inside) if inside else self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
        if rest[:1] == ["paths-info"]:
            return self.json([entry for entry in entries if entry["path"] in self.asked["paths"]])
        siblings = [{"rfilename": path} for path in files]
        return self.json({"_id": "1", "id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def file(self, folder: Path, name: str) -> None:
        """The bytes of a file."""
        headers = {"X-Repo-Commit": COMMIT}
        if str(folder).endswith(self.closed):
            return self.answer(b"", 403, {**headers, "X-Error-Code": "GatedRepo"})
        if not (folder / name).is_file():
            return self.answer(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = (folder / name).read_bytes()
        return self.answer(content, 200, {**headers, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def json(self, value: object) -> None:
        self.answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def answer(self, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A hub with a model and a data set, an empty cache, and the variables that lead to both."""
    models, rows = tmp_path / "hub" / "models" / "org", tmp_path / "hub" / "datasets" / "org" / "rows"
    models.mkdir(parents=True)
    rows.mkdir(parents=True)
    (models / "tiny").symlink_to(Path(finetune.assets.__file__).parent / "tiny")
    for name in ("closed", "pickled"):
        (models / name).mkdir()
        (models / name / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    (models / "pickled" / "pytorch_model.bin").write_bytes(b"never read")
    lines = [json.dumps({"prompt": f"What is {n}?", "completion": f"It is the number {n}."}) for n in range(60)]
    (rows / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"root": tmp_path / "hub"}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inherited = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    yield {
        **inherited,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    server.shutdown()
    server.server_close()


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_run_from_the_hub_and_again_from_its_cache(tmp_path: Path, environment: dict[str, str]) -> None:
    """Model and rows are fetched once; with the hub gone, the cache serves."""
    command = [
        "train.py", "+experiment=smoke", "model.path=org/tiny", "data.train=org/rows", "train.max_steps=1",
        "train.samples=0", "train.eval_every=null", "train.save_every=null", "export.formats=[]", "tracking=off",
    ]  # fmt: skip
    done = python(environment, *command, f"output_dir={tmp_path}/run")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert record["status"] == "finished"
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert adapter["base_model_name_or_path"] == "org/tiny"
    offline = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    again = python(offline, *command, f"output_dir={tmp_path}/again")
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert json.loads((tmp_path / "again" / "run.json").read_text("utf-8"))["digests"] == record["digests"]


def test_what_the_hub_refuses_is_one_line(environment: dict[str, str]) -> None:
    program = """
import sys
from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.model.check import check_directory
from finetune.model.hub import fetch
for path, revision in (("org/nothing", None), ("org/tiny", "v9"), ("org/closed", None), ("org/pickled", None)):
    try:
        check_directory(fetch(ModelConfig(path=path, revision=revision)))
    except ModelError as error:
        print(" ".join(str(error).split()))
"""
    done = python(environment, "-c", program)
    assert done.returncode == 0, done.stderr
    nothing, revision, closed, pickled = done.stdout.strip().splitlines()
    assert "org/nothing is neither a directory here nor a model on the hub" in nothing
    assert "model.revision=v9 does not exist in org/tiny" in revision
    assert "org/closed asks for consent" in closed
    assert "pickle" in pickled or "no weights" in pickled


def test_a_hub_that_cannot_be_reached(environment: dict[str, str]) -> None:
    done = python({**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}, "train.py", "model.path=org/tiny")
    assert done.returncode == 2, done.stderr
    assert "the hub cannot be reached" in done.stderr and len(done.stderr.strip().splitlines()) == 1
