"""The page in headless Chromium, as somebody uses it: `page.py URL PID-OF-THE-ECHO-WORKER FOLDER-FOR-PICTURES`."""

import os
import signal
import sys

from playwright.sync_api import expect, sync_playwright

ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
url, pid, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGS)
    page = browser.new_page(viewport={"width": 1100, "height": 720})
    troubles: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)

    # send and stream, by keyboard alone
    expect(page.locator("#model option")).to_have_count(2)
    expect(page.locator("#text")).to_be_focused()
    page.locator("#model").select_option("tiny")
    page.locator("#seed").fill("1")
    page.locator("#text").focus()
    page.keyboard.type("Tell me about the sea")
    page.keyboard.press("Enter")
    figures = page.locator(".figures")
    expect(figures).to_have_count(1, timeout=20_000)
    expect(page.locator(".turn.assistant .said")).to_contain_text("sea")
    for said in ("stop", "tokens", "first token", "tokens/s"):
        expect(figures).to_contain_text(said)
    page.screenshot(path=f"{folder}/chat.png")

    # raw request and response
    page.get_by_role("button", name="Raw").click()
    expect(page.locator("pre.raw").first).to_contain_text('"Tell me about the sea"')
    expect(page.locator("pre.raw").last).to_contain_text("chat.completion.chunk")
    page.get_by_role("button", name="Raw").click()
    expect(page.locator("pre.raw")).to_have_count(0)

    # another answer in its place, then stop one in its middle
    page.locator("#seed").fill("3")
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".turn.assistant")).to_have_count(1)
    expect(figures).to_have_count(1, timeout=20_000)
    page.locator("#more").fill('{"ignore_eos": true, "max_tokens": 100000}')
    page.locator("#text").fill("Go on for ever")
    page.locator("#text").press("Enter")
    expect(page.locator(".turn.assistant .said").nth(1)).to_contain_text(" ")
    expect(page.get_by_role("button", name="Stop")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(figures.nth(1)).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()

    # another model; what it says is text, whatever it is
    page.locator("#more").fill("")
    page.get_by_role("button", name="Clear").click()
    page.locator("#model").select_option("echo")
    page.locator("#text").fill('<img src=x onerror="document.title=1"> <b>bold</b>')
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".turn.assistant .said")).to_contain_text("<b>bold</b>")
    assert page.locator(".said img, .said b").count() == 0
    assert page.title() == "dynamo-grpc"

    # an error is told, with the request's id
    page.locator("#more").fill('{"n": 0}')
    page.locator("#text").fill("again")
    page.locator("#text").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("n: ")
    expect(page.get_by_role("alert")).to_contain_text("request ")
    page.locator("#more").fill("{")
    page.locator("#text").fill("again")
    page.locator("#text").press("Enter")
    expect(page.get_by_role("alert")).to_have_count(2)
    page.locator("#more").fill("")

    # the API's reference
    page.goto(f"{url}docs")
    operation = page.locator("#operations > details", has_text="/v1/chat/completions")
    operation.locator("summary").first.press("Enter")
    expect(operation).to_contain_text("max_completion_tokens")
    expect(operation).to_contain_text("integer (1 … below 2^32)")
    field = operation.locator("details", has_text="the fields of messages").first
    field.locator("summary").first.click()
    expect(field).to_contain_text("role")
    field.locator("summary", has_text="the fields of content").click()
    expect(field).to_contain_text("image_url")
    page.screenshot(path=f"{folder}/api.png")

    # the mesh, and a worker that goes
    page.get_by_role("link", name="Mesh").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#workers tr")).to_have_count(3)
    expect(page.locator("#models")).to_contain_text("tiny")
    expect(page.locator("#errors")).to_contain_text("the client went away")
    page.screenshot(path=f"{folder}/mesh.png")
    os.kill(pid, signal.SIGKILL)
    expect(page.locator("#workers tr")).to_have_count(2, timeout=20_000)
    expect(page.locator("#models")).to_contain_text("nobody serves it", timeout=20_000)
    expect(page.locator("#state")).to_contain_text("1 model, 1 worker", timeout=20_000)
    page.get_by_role("link", name="Chat").click()
    expect(page.locator("#model option")).to_have_count(1)

    # a phone, in the dark
    phone = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    phone.goto(url)
    expect(phone.locator("#model option")).to_have_count(1)
    for view in ("#chat", "#mesh", "#api"):
        phone.goto(url + view)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(18, 21, 27)"
    phone.screenshot(path=f"{folder}/phone.png")

    assert not troubles, troubles
    strange = [one for one in asked if not one.startswith(url)]
    assert not strange, strange
    browser.close()
print("all is well")
