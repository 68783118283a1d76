"""Tests the report's server: it answers its own page on this machine, and refuses everything else."""

import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from run_folders import ball, served, write_run
from synthetic import read

from voxquilt.errors import ConfigError
from voxquilt.report.page import key_of
from voxquilt.report.server import ReportServer
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.thumbnails import path_of

pytestmark = pytest.mark.timeout(60)
SECRET = b"what nobody may read"
HEADERS = {
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two subjects, beside a secret that links in its folder lead to."""
    place = tmp_path_factory.mktemp("served")
    rows = [ball(place, "a", 5), ball(place, "b", 6), Row("c", "failed", error="gone")]
    (place / "secret.txt").write_bytes(SECRET)
    (place / "out" / "link.txt").symlink_to(place / "secret.txt")
    (place / "out" / "unnamed.txt").write_bytes(SECRET)
    (place / "out" / "deep").symlink_to(place)
    evil = ("link.txt", "../secret.txt", str(place / "secret.txt"), "deep/secret.txt", "a_labels.nii.gz")
    rows[0] = Row("a", "done", evil, volume_ml=1.0, kinds=("map",) * 4 + ("labels",), inputs=rows[0].inputs)
    picture = path_of(place / "out", "overlay", "b")
    picture.parent.mkdir(parents=True)
    picture.symlink_to(place / "secret.txt")
    write_run(place / "out", rows)
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[ReportServer]:
    """A running server."""
    with served(place / "out") as server:
        yield server


def ask(
    server: ReportServer, path: str, method: str = "GET", **headers: str | None
) -> tuple[http.client.HTTPResponse, bytes]:
    """Ask for a path as it is, with a browser's headers or others."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    given = {"Host": f"127.0.0.1:{server.port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    for name, value in HEADERS.items():
        assert answer.headers.get_all(name) == [value], (path, name)
    assert "default-src 'none'" in (answer.getheader("Content-Security-Policy") or "")
    assert "unsafe" not in (answer.getheader("Content-Security-Policy") or "")
    assert answer.getheader("Access-Control-Allow-Origin") is None
    assert SECRET not in body
    return answer, body


def status(server: ReportServer, path: str, method: str = "GET", **headers: str | None) -> int:
    return ask(server, path, method, **headers)[0].status


def test_the_page_its_outputs_and_its_viewer_are_served(server: ReportServer, place: Path) -> None:
    """With types; HEAD has the same headers and no body."""
    root = f"/{server.token}"
    for path in (
        "/report.html",
        "/",
        "/report/viewer.html",
        "/report/viewer.js",
        "/report/report.css",
        "/report.html?x=1",
    ):
        answer, body = ask(server, root + path)
        assert answer.status == 200, path
        head, nothing = ask(server, root + path, "HEAD")
        assert (head.status, head.getheader("Content-Length"), nothing) == (200, str(len(body)), b"")
    assert ask(server, f"{root}/b_labels.nii.gz")[1] == (place / "out/b_labels.nii.gz").read_bytes()
    assert status(server, f"{root}/report.html", Host=f"localhost:{server.port}") == 200
    assert status(server, f"{root}/report.html", Sec_Fetch_Site="same-origin") == 200


def test_volumes_are_copies_of_inputs_and_outputs(server: ReportServer, place: Path) -> None:
    """In the order of the description, which also has the neighbours in the page's order."""
    root = f"/{server.token}/report/volumes"
    a, b = key_of("a"), key_of("b")
    about = json.loads(ask(server, f"{root}/{b}.json")[1])
    assert about["volumes"] == [{"name": "image", "kind": "image"}, {"name": "labels", "kind": "labels"}]
    assert (about["previous"], about["next"]) == (a, "")
    body = ask(server, f"{root}/{b}/1")[1]
    length = int.from_bytes(body[:4], "little")
    assert json.loads(body[4 : 4 + length])["classes"][1]["name"] == "ball"
    (place / "copy.nii").write_bytes(body[4 + length :])
    assert (read(place / "copy.nii") == read(place / "out/b_labels.nii.gz")).all()
    assert [status(server, f"{root}/{b}/{n}") for n in ("2", "9999", "-1", "x", "")] == [404] * 5
    assert status(server, f"{root}/{key_of('c')}.json") == 404
    assert [v["name"] for v in json.loads(ask(server, f"{root}/{a}.json")[1])["volumes"]] == ["image", "labels"]


TRAVERSALS = [
    "../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "report/../../secret.txt", "./report.html",
    "/report.html", "..\\secret.txt", "%00", "report/thumbnails/overlay/../../../../secret.txt", "unnamed.txt",
    "manifest.csv", "run.json", "deep/secret.txt", "%252e%252e/secret.txt", "in/a.nii.gz", "c_labels.nii.gz",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_leads_out_of_the_table(server: ReportServer, path: str) -> None:
    """Nor to files in the folder that no manifest names."""
    assert status(server, f"/{server.token}/{path}") == 404


def test_absolute_paths_and_foreign_addresses_lead_nowhere(server: ReportServer, place: Path) -> None:
    """Such as a proxy is asked for."""
    for path in (f"{place}/secret.txt", f"/x/{server.token}/report.html", "http://example.org/", "*"):
        assert status(server, path) == 404, path
    assert status(server, f"/{server.token}/{place}/secret.txt") == 404


@pytest.mark.parametrize("name", ["link.txt", "report/thumbnails/overlay/b.jpg"])
def test_a_link_out_of_the_folder_is_refused(server: ReportServer, name: str) -> None:
    """Even if the manifest names it."""
    answer, body = ask(server, f"/{server.token}/{name}")
    assert answer.status == 404
    assert b"leads out of the folder" in body


def test_a_wrong_token_is_refused(server: ReportServer) -> None:
    """Whatever else is right, also one that begins or ends like the right one."""
    token = server.token
    for wrong in ("", token[:-1], f"{token}x", token.swapcase(), f"%20{token}", f"{token}%20", "%C3%BC"):
        assert status(server, f"/{wrong}/report.html") == 404, wrong
    assert len(token) >= 32


def test_every_server_has_a_token_and_a_port_of_its_own(server: ReportServer, place: Path) -> None:
    """So that none is known from before; a port that is taken is a message."""
    with ReportServer(place / "out") as other:
        assert other.token != server.token
        assert other.port != server.port
    for port in (server.port, 70000, -1):
        with pytest.raises(ConfigError, match="cannot listen on port"):
            ReportServer(place / "out", port)


def test_foreign_host_headers_are_refused(server: ReportServer) -> None:
    """As in DNS rebinding: a name that leads to 127.0.0.1 is still another site's."""
    path = f"/{server.token}/report.html"
    port = server.port
    hosts = ("example.org", f"example.org:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"127.0.0.2:{port}", "", None,
             f"127.0.0.1:{port}.example.org", f"0.0.0.0:{port}")  # fmt: skip
    assert {host: status(server, path, Host=host) for host in hosts} == dict.fromkeys(hosts, 421)


def test_two_host_headers_are_refused(server: ReportServer) -> None:
    """Even if one is right."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        own = f"127.0.0.1:{server.port}"
        raw.sendall(f"GET /{server.token}/report.html HTTP/1.1\r\nHost: {own}\r\nHost: example.org\r\n\r\n".encode())
        assert b" 421 " in raw.recv(100)


def test_what_other_sites_ask_for_is_refused(server: ReportServer) -> None:
    """As browsers say of it."""
    path = f"/{server.token}/report.html"
    assert {site: status(server, path, Sec_Fetch_Site=site) for site in ("cross-site", "same-site", "x")} == {
        "cross-site": 403, "same-site": 403, "x": 403,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get", "PROPFIND"])
def test_other_methods_are_refused(server: ReportServer, method: str) -> None:
    """With the same headers."""
    answer, _ = ask(server, f"/{server.token}/report.html", method)
    assert (answer.status, answer.getheader("Allow")) == (405, "GET, HEAD")


def test_what_is_not_http_is_refused_and_harms_nobody(server: ReportServer) -> None:
    """And a connection that is closed in the middle."""
    for text in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"a" * 70000 + b" HTTP/1.1\r\n\r\n",
        b"",
        b"GET",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
            raw.sendall(text)
            raw.shutdown(socket.SHUT_WR)
            assert b" 200 " not in raw.recv(1000)
    assert status(server, f"/{server.token}/report.html") == 200


def test_it_listens_on_loopback_alone(server: ReportServer) -> None:
    """The socket's address is 127.0.0.1, and another address of the machine is refused."""
    listening = [c.laddr for c in psutil.Process(os.getpid()).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening if address.port == server.port] == ["127.0.0.1"]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", server.port), timeout=5)


def test_a_damaged_volume_is_a_message(server: ReportServer, place: Path) -> None:
    """And the server goes on."""
    path = place / "out/b_labels.nii.gz"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-20])
        answer, body = ask(server, f"/{server.token}/report/volumes/{key_of('b')}/1")
        assert (answer.status, b"truncated or damaged" in body) == (404, True)
    finally:
        path.write_bytes(whole)
    assert status(server, f"/{server.token}/report/volumes/{key_of('b')}/1") == 200
