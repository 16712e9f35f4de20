"""A package index's simple interface (PEP 503 and 691), for machines without pip and uv."""

from __future__ import annotations

import base64
import configparser
import hashlib
import json
import os
import re
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from functools import partial
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler, Request, build_opener

import platformdirs

_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
_SECONDS = 60.0
_LARGEST_PAGE, _AT_ONCE = 20_000_000, 1 << 20  # bytes


@dataclass(frozen=True)
class Sources:
    """Where packages come from, by the environment and pip's configuration.

    Attributes:
        indexes: URLs of simple interfaces, in the order of use.
        find_links: further folders and pages with links to files.
        certificates: a file of authorities to trust, None for the system's.
        proxy: None for the environment's.
    """

    indexes: tuple[str, ...]
    find_links: tuple[str, ...] = ()
    certificates: str | None = None
    proxy: str | None = None


def sources(environment: Mapping[str, str] = os.environ) -> Sources:
    """Read where packages come from: pip's variables and uv's, then pip's files."""
    configured = _pip_files(environment)

    def values(option: str, *more: str) -> list[str]:
        names = (f"PIP_{option.upper().replace('-', '_')}", *more)
        default = configured.get(option, "")
        return next((environment[name] for name in names if environment.get(name, "").strip()), default).split()

    main = values("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
    further = values("extra-index-url", "UV_INDEX", "UV_EXTRA_INDEX_URL")
    if (environment.get("PIP_NO_INDEX") or configured.get("no-index") or "0").lower() in ("1", "true", "yes", "on"):
        main, further = [], []
    certificates = values("cert", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    proxy = values("proxy")
    return Sources(
        tuple(dict.fromkeys(re.sub(r"^[\w.-]+=(?=\w+:)", "", url) for url in (*main, *further))),  # uv: NAME=URL
        tuple(values("find-links", "UV_FIND_LINKS")),
        certificates[0] if certificates else None,
        proxy[0] if proxy else None,
    )


def _pip_files(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the options of pip's configuration files; a later file, and `download`, win over others."""
    given = environment.get("PIP_CONFIG_FILE")
    if given == os.devnull:
        return {}
    name = "pip.ini" if os.name == "nt" else "pip.conf"
    shared = [Path(folder) / "pip" for folder in environment.get("XDG_CONFIG_DIRS", "/etc/xdg").split(os.pathsep)]
    folders = [*shared, Path("/etc"), Path.home() / ".pip", Path.home() / ".config/pip"]
    folders.append(Path(platformdirs.user_config_dir("pip", False)))
    files = [*(folder / name for folder in folders), Path(sys.prefix) / name, *([Path(given)] if given else [])]
    found: dict[str, str] = {}
    for section in ("global", "download"):
        for file in files:
            parser = configparser.RawConfigParser()
            try:
                parser.read(file, encoding="utf-8")
            except (configparser.Error, OSError, UnicodeDecodeError):  # pip itself says what is wrong with it
                continue
            if parser.has_section(section):
                found |= {option.replace("_", "-"): value for option, value in parser.items(section)}
    return found


def download_wheel(package: str, version: str, sha256: str, folder: Path, most: int, where: Sources) -> Path:
    """Download a wheel from the first source that has it, and check its hash.

    Args:
        sha256: of the file; a link with another hash is not followed.
        most: the largest size in bytes.

    Raises:
        LookupError: no source has it; the message names each, and why.
    """
    try:
        opener, failed = _opener(where), list[str]()
    except OSError as error:
        raise LookupError(f"the certificates in {where.certificates} cannot be read: {error}") from error
    spelled = "[-_.]+".join(map(re.escape, re.split(r"[-_.]+", package)))
    wanted = re.compile(rf"{spelled}-{re.escape(version)}-.*\.whl", re.IGNORECASE)
    for url, at in _pages(package, where):
        try:
            for link in _links(opener, url):
                name = unquote(urlsplit(link).path).rsplit("/", 1)[-1]
                digest = re.search(r"sha256=([0-9a-f]{64})", urlsplit(link).fragment)
                if wanted.fullmatch(name) and (digest is None or digest[1] == sha256):
                    return _fetched(opener, link, folder / Path(name).name, sha256, most)
            failed.append(f"{at} does not have it")
        except HTTPError as error:
            failed.append(f"{at} does not have it" if error.code in (404, 410) else f"{at}: {error}")
        except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
            failed.append(f"{at}: {getattr(error, 'reason', None) or error}")
    raise LookupError("; ".join(failed) or "no package index is configured")


def _pages(package: str, where: Sources) -> Iterator[tuple[str, str]]:
    """Yield the pages that may link to a package's files, and their names for messages."""
    normal = re.sub(r"[-_.]+", "-", package).lower()  # PEP 503
    for index in where.indexes:
        yield f"{index.rstrip('/')}/{normal}/", without_password(index)
    for link in where.find_links:
        yield (link if "://" in link else Path(link).expanduser().absolute().as_uri()), without_password(link)


def without_password(url: str) -> str:
    """Return a URL without its user name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if parts.netloc else url


def _links(opener: OpenerDirector, url: str) -> Iterator[str]:
    """Return the files that a page, or a folder on the disk, links to."""
    if urlsplit(url).scheme == "file":
        place = Path(unquote(urlsplit(url).path))
        if place.is_dir() and not (place / "index.html").is_file():
            return (file.as_uri() for file in place.iterdir())
        url = (place / "index.html" if place.is_dir() else place).as_uri()
    with opener.open(_request(url), timeout=_SECONDS) as answer:
        body, base = answer.read(_LARGEST_PAGE), answer.geturl()
        kind = answer.headers.get_content_type() if isinstance(answer.headers, Message) else "text/html"
    if kind.endswith("json"):
        files = json.loads(body)["files"]
        return (
            urljoin(base, file["url"]) + (f"#sha256={digest}" if (digest := file["hashes"].get("sha256")) else "")
            for file in files
        )
    page = _Page(_with_password_of(url, base))
    page.feed(body.decode("utf-8", "replace"))
    return iter(page.links)


class _Page(HTMLParser):
    """Collects the links of a page."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        to = dict(attrs).get("href")
        if to and tag == "base":
            self.base = urljoin(self.base, to)
        elif to and tag == "a":
            self.links.append(urljoin(self.base, to))


def _with_password_of(asked: str, answered: str) -> str:
    """Return where an answer came from, with the password that was sent to the same host."""
    before, after = urlsplit(asked), urlsplit(answered)
    same = before.netloc.rpartition("@")[2] == after.netloc
    return urlunsplit(after._replace(netloc=before.netloc)) if same else answered


def _fetched(opener: OpenerDirector, url: str, file: Path, sha256: str, most: int) -> Path:
    digest, size = hashlib.sha256(), 0
    with opener.open(_request(url), timeout=_SECONDS) as answer, file.open("wb") as out:
        for block in iter(partial(answer.read, _AT_ONCE), b""):
            size += len(block)
            if size > most:
                raise ValueError(f"{file.name} is larger than {most} bytes")
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{file.name} is not the file expected: its sha256 differs from {sha256}")
    return file


def _opener(where: Sources) -> OpenerDirector:
    handlers = [HTTPSHandler(context=ssl.create_default_context(cafile=where.certificates))]
    proxies = [ProxyHandler({"http": where.proxy, "https": where.proxy})] if where.proxy else []
    return build_opener(*handlers, *proxies)


def _request(url: str) -> Request:
    """Return a request without its fragment; a name and a password go into a header."""
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http", "file"):
        raise ValueError(f"{without_password(url)} is no http, https or file address")
    headers = {"Accept": _ACCEPT}
    user, at, host = parts.netloc.rpartition("@")
    if at:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
    return Request(urlunsplit(parts._replace(netloc=host, fragment="")), headers=headers)  # noqa: S310
