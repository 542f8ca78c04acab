"""Which requests the panel answers, by real ones: other pages, other names of this machine,
websockets, and a password where other machines can connect. docs/security.md lists them."""

from __future__ import annotations

import base64
import http.client
import os
import re
import signal
import socket
import time

import pytest

from tests.browser import chromium
from tests.end_to_end.panels import StartedPanel, panel_in
from tests.launching import cli, script

SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport="
PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    with panel_in(tmp_path_factory.mktemp("panel")) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A panel that other machines can reach, with a password."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "password").write_text(PASSWORD + "\nmore\n")
    with panel_in(folder, "--host", "0.0.0.0", "--password-file", "password") as found:
        yield found


def ask(panel: StartedPanel, path="/", method="GET", body=None, **headers):
    """The status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", panel.port, timeout=30)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode(errors="replace")


def handshake(panel: StartedPanel, **headers):
    """The status of a websocket's handshake."""
    key = base64.b64encode(os.urandom(16)).decode()
    sent = {"Host": f"127.0.0.1:{panel.port}", "Connection": "Upgrade", "Upgrade": "websocket"}
    sent |= {"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    with socket.create_connection(("127.0.0.1", panel.port), timeout=30) as connection:
        connection.sendall(f"GET {SOCKET}websocket HTTP/1.1\r\n{lines}\r\n".encode())
        return int(connection.recv(100).split()[1])


def own(panel):
    return f"http://127.0.0.1:{panel.port}"


class TestAnotherPage:
    def test_the_panels_own_requests_are_answered(self, panel):
        status, headers, text = ask(panel)
        assert status == 200 and "accum-trainer" in text
        assert ask(panel, Origin=own(panel))[0] == 200
        assert ask(panel, f"{SOCKET}polling", Origin=own(panel))[0] == 200
        assert handshake(panel) == handshake(panel, Origin=own(panel)) == 101
        # Forwarded by ssh under another port, it is one origin still.
        assert ask(panel, Host="localhost:9000", Origin="http://localhost:9000")[0] == 200
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'self'" in headers["content-security-policy"]

    @pytest.mark.parametrize(
        "origin",
        ["http://evil.example", "http://localhost:3000", "null", "file://", "https://[", ""],
    )
    def test_its_requests_and_websockets_are_refused(self, panel, origin):
        for path in ("/", f"{SOCKET}polling"):
            status, _, text = ask(panel, path, Origin=origin)
            assert status == 403 and text.startswith("refused: ")
        assert ask(panel, f"{SOCKET}polling", "POST", "40", Origin=origin)[0] == 403
        assert handshake(panel, Origin=origin) == 403

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_it_may_link_to_the_panel_and_not_load_it(self, panel, site):
        def fetched(path, mode, dest):
            more = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
            return ask(panel, path, **more)[0]

        assert fetched("/", "navigate", "document") == 200
        assert fetched("/", "navigate", "iframe") == 403
        assert fetched(f"{SOCKET}polling", "no-cors", "empty") == 403
        assert fetched("/", "no-cors", "script") == 403


class TestAnotherName:
    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1", "", "["]
    )
    def test_that_somebody_points_here_is_refused(self, panel, host):
        """DNS rebinding: the page's own origin is the panel's address then."""
        assert ask(panel, Host=host)[0] == 403
        assert ask(panel, Host=host, Origin=f"http://{host}")[0] == 403
        assert handshake(panel, Host=host, Origin=f"http://{host}") == 403

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.1:1", "[::1]:80"])
    def test_of_this_machine_is_answered(self, panel, host):
        assert ask(panel, Host=host)[0] == 200

    def test_it_listens_on_this_machine_only(self, panel):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address of the way out
            address = probe.getsockname()[0]
        if address.startswith("127."):
            pytest.skip("this machine has no other address")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, panel.port), timeout=5)


class TestOtherMachines:
    @pytest.mark.parametrize(
        ("arguments", "more", "says"),
        [
            (["--host", "0.0.0.0"], {}, "host=0.0.0.0 lets other machines start processes here"),
            (["--host", "::"], {}, "give a password with --password-file"),
            (
                ["--host", "0.0.0.0"],
                {"ACCUM_TRAINER_PANEL_PASSWORD": "short"},
                "has 5 characters; give at least 8",
            ),
            (["--password-file", "none"], {}, "password_file=none cannot be read: No such file"),
            (
                ["--host", "192.0.2.1", "--password-file", "good"],
                {},
                "host=192.0.2.1 port=0 cannot",
            ),
            (["--port", "99999"], {}, "99999 is not in the range 0<=x<=65535"),
        ],
    )
    def test_need_a_password(self, tmp_path, arguments, more, says):
        (tmp_path / "good").write_text(PASSWORD)
        run = cli("panel", "--port", 0, *arguments, cwd=tmp_path, timeout=60, **more)
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert says in " ".join(run.stderr.split())

    def test_see_a_login_and_nothing_else_before_it(self, guarded):
        for path in ("/", "/watch", "/login", f"{SOCKET}polling", "/_nicegui/x"):
            status, headers, text = ask(guarded, path)
            assert status == 401 and "Password" in text and "runs" not in text
            assert "set-cookie" not in headers
        assert handshake(guarded) == 403
        assert handshake(guarded, Cookie="accum_trainer_panel=; a=b") == 403

    def test_log_in_with_the_password_only(self, guarded):
        start = time.monotonic()
        wrong = ask(guarded, "/login", "POST", "password=correct+horse")
        assert wrong[0] == 401 and "This is not the password." in wrong[2]
        assert time.monotonic() - start >= 1  # guesses take their time
        assert ask(guarded, "/login", "POST", "x" * 50_000)[0] == 401
        body = "password=" + PASSWORD.replace(" ", "+")
        elsewhere = ask(guarded, "/login", "POST", body, Origin="http://evil.example")
        assert elsewhere[0] == 403 and "set-cookie" not in elsewhere[1]
        status, headers, _ = ask(guarded, "/login", "POST", body)
        assert status == 303 and headers["location"] == "/"
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        known = {"Cookie": cookie.partition(";")[0]}
        assert ask(guarded, **known)[0] == 200 and handshake(guarded, **known) == 101
        assert ask(guarded, **known, Host="evil.example")[0] == 403
        assert ask(guarded, **known, Host="10.1.2.3", Origin="http://10.1.2.3")[0] == 200
        assert handshake(guarded, **known, Origin="http://evil.example") == 403


def test_a_browser_logs_in_and_stays(tmp_path):
    (tmp_path / "password").write_text(PASSWORD)
    with chromium() as browser, panel_in(tmp_path, "--password-file", "password") as panel:
        page = browser.new_page()
        page.goto(own(panel))
        page.keyboard.type("not the password")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("This is not the password.").wait_for()
        page.get_by_label("Password").fill(PASSWORD)
        page.keyboard.press("Enter")
        page.locator("#content:not([inert])").wait_for()  # connected
        page.get_by_role("textbox", name="Batch size").fill("8")
        page.get_by_text("Effective Batch: 8").wait_for()  # by its websocket
        page.goto(f"{own(panel)}/watch")
        page.get_by_text("No runs yet.").wait_for()


def test_runs_do_not_get_the_password(tmp_path):
    from accum_trainer.panel import processes, programs
    from accum_trainer.panel.commands import Command

    os.environ[programs.PASSWORD] = PASSWORD
    try:
        words = ["accum-trainer", "plan"]
        processes.start(Command(words, None, ""), tmp_path / "run")
        start = processes.read_start(tmp_path / "run")
        assert start is not None
        environment = open(f"/proc/{start.process}/environ").read()  # noqa: SIM115
        assert PASSWORD not in environment and "PATH=" in environment
    finally:
        del os.environ[programs.PASSWORD]
    while processes.read_start(tmp_path / "run").status is None:
        time.sleep(0.05)
    # No one else reads a log, whose messages quote rows.
    assert (tmp_path / "run" / "logs" / "panel.log").stat().st_mode & 0o077 == 0


def test_ctrl_c_ends_the_panel_with_status_0(tmp_path):
    panel = StartedPanel(tmp_path)
    assert re.search(r"panel: http://127.0.0.1:\d+/ \(runs in runs; Ctrl-C ends", panel.out)
    panel.signal(signal.SIGINT)
    assert panel.ended() == 0 and "Traceback" not in panel.err


def test_ctrl_c_while_the_server_starts_is_not_lost(tmp_path):
    """Python drops a KeyboardInterrupt that is raised in a destructor, as here."""
    hook = tmp_path / "hook.py"
    hook.write_text(
        "import os, signal, time, uvicorn\nrun = uvicorn.Server.run\n"
        "def interrupted(self, **options):\n    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(0.1)\n"
        "    except KeyboardInterrupt:\n        pass\n    run(self, **options)\n"
        "uvicorn.Server.run = interrupted\n"
    )
    panel = StartedPanel(tmp_path, ACCUM_TESTS_HOOK=hook)
    assert panel.ended() == 0 and "Traceback" not in panel.err


def test_without_the_extra_it_says_how_to_install_it(tmp_path):
    code = (
        "import importlib.util as u, json, sys\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'nicegui' else find(name, *a)\n"
        "from accum_trainer.cli import main\nmain(['panel'])"
    )
    run = script(code, tmp_path)
    assert run.returncode == 2 and not list(tmp_path.iterdir())
    assert "error: the panel needs NiceGUI" in run.stderr and "pip install" in run.stderr
