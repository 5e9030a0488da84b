"""The page in headless Chromium, served from this machine alone."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from running import CASES, EXAMPLES, prompt_and_answer, run, words

# A WebGPU adapter that computes on the CPU, where Chromium brings it.
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")


class Handler(SimpleHTTPRequestHandler):
    """The examples' folder, and one export at /model/."""

    def __init__(self, *arguments, export: Path, **more):
        self.export = export
        super().__init__(*arguments, directory=str(EXAMPLES), **more)

    def translate_path(self, path: str) -> str:
        if path.startswith("/model/"):
            return str(self.export / Path(path).name)
        return super().translate_path(path)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def serve(request) -> Iterator:
    """Serve the examples with an export; the address."""
    servers = []

    def start(export: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, export=export))
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in ("chromium", "google-chrome", "chrome"):
        if program := shutil.which(name):
            return program
    return pytest.skip("needs Chromium")


def submit(node: str, chromium: str, address: str, submissions: list, *flags: str) -> dict:
    """Submit the page's form some times; its status and answer each time, and all requests."""
    script = Path(__file__).with_name("use_page.mjs")
    url = f"{address}browser/index.html"
    return json.loads(run(node, script, chromium, url, json.dumps(submissions), *flags))


def use_page(node: str, chromium: str, address: str, submissions: list, *flags: str) -> dict:
    """The same, where nothing is wrong and all comes from the page's own server."""
    result = submit(node, chromium, address, submissions, *flags)
    assert result["complaints"] == []
    assert all(url.startswith((address, "blob:", "data:")) for url in result["requests"])
    return result


@pytest.mark.parametrize("case", CASES)
def test_page_in_webassembly(export, node, chromium, serve, case):
    address = serve(export(case, kv_layout="batch"))
    prompt, answer = prompt_and_answer(case)
    ids = {"device": "wasm", "max-tokens": "12", "tokens": ",".join(map(str, prompt))}
    text = {"tokens": "", "prompt": words(prompt)}
    by_ids, by_text = use_page(node, chromium, address, [ids, text])["results"]
    assert json.loads(by_ids["answer"]) == answer
    assert by_text["answer"] == words(answer)
    assert "12 tokens in" in by_text["status"] and "on wasm" in by_text["status"]


def test_page_on_webgpu(export, node, chromium, serve):
    # With more than 32 rows, prefix and all, onnxruntime-web's attention computes in subgroups, and
    # gets it wrong on an adapter whose subgroups have four lanes, as the software one's do.
    case = "p8-short-prefix"
    address = serve(export(case, kv_layout="batch"))
    prompt, answer = prompt_and_answer(case)
    fields = {"tokens": ",".join(map(str, prompt)), "max-tokens": "4"}
    result = use_page(node, chromium, address, [fields], *SOFTWARE_GPU)
    (only,) = result["results"]
    assert ("on webgpu" if result["adapter"] else "on wasm") in only["status"]
    assert json.loads(only["answer"]) == answer[:4]
    if not result["adapter"]:
        pytest.skip("this Chromium has no WebGPU adapter")


def test_page_says_what_is_wrong(export, node, chromium, serve):
    address = serve(export("p4", kv_layout="batch"))
    submissions = [{"model": "../nothing", "tokens": "1,2"}, {"model": "../model", "tokens": "1,x"}]
    missing, not_ids = submit(node, chromium, address, submissions)["results"]
    assert missing["status"].startswith("Error: ../nothing/config.json: 404")
    assert not_ids["status"].startswith("Error: ")
