"""`python docs/_check_pages.py HTML CHROMIUM`: looks at all pages in headless Chromium, as `nox -s docs` does.

Every page, at the width of a phone and of a desk: it does not scroll sideways, logs no error, and loads nothing from
elsewhere. The search finds what newcomers look for.
"""

import contextlib
import functools
import http.server
import pathlib
import sys
import threading

from playwright.sync_api import sync_playwright

WIDTHS = (390, 1280)
WORDS = ("Hugging Face", "TensorBoard", "float64", "ONNX", "GPU")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and logs nothing."""

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(folder):
    """Serve a folder on loopback; yields the address."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), handler
    ) as server:
        threading.Thread(
            target=server.serve_forever, daemon=True
        ).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def pages_of(folder):
    """The pages that people read: not the sources that `viewcode` shows, which are all alike."""
    pages = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.html")
    )
    modules = [page for page in pages if page.startswith("_modules")]
    return [page for page in pages if page not in modules] + modules[:2]


def check(folder, chromium):
    """Yield what is wrong."""
    with serving(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=ARGUMENTS
        )
        tab = browser.new_page()
        said = []
        tab.on(
            "console",
            lambda message: (
                message.type == "error" and said.append(message.text)
            ),
        )
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:"))
                or said.append(f"loads {request.url}")
            ),
        )
        for page in pages_of(folder):
            tab.goto(f"{address}/{page}")
            for width in WIDTHS:
                tab.set_viewport_size({"width": width, "height": 800})
                needed = tab.evaluate(
                    "document.documentElement.scrollWidth"
                )
                if needed > width:
                    yield f"{page}: is {needed} pixels wide on a screen of {width}"
            yield from (f"{page}: {text}" for text in said)
            said.clear()
        for words in WORDS:
            tab.goto(
                f"{address}/search.html?q={words.replace(' ', '+')}"
            )
            tab.wait_for_selector("#search-results > p:not(:empty)")
            tab.wait_for_function(
                "!document.querySelector('#search-progress:not(:empty)')"
            )
            if not tab.locator("#search-results li").count():
                yield f"the search does not find {words!r}"
        browser.close()


def main():
    """Exit with 1 if something is wrong."""
    folder, chromium = sys.argv[1:]
    faults = list(check(pathlib.Path(folder).resolve(), chromium))
    sys.stdout.write(
        "\n".join(faults) or "Chromium finds no fault with the pages."
    )
    sys.stdout.write("\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
