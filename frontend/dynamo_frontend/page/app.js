// Which view is shown, and whether the frontend answers.
import { showApi } from "/page/api.js";
import { startChat, showModels } from "/page/chat.js";
import { startMesh } from "/page/mesh.js";

const views = ["chat", "mesh", "api"];

function show() {
  const wanted = views.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat";
  for (const view of views) document.getElementById(view).hidden = view !== wanted;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${wanted}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (wanted === "api") showApi();
  if (wanted === "chat") document.getElementById("text").focus();
}

async function look() {
  const state = document.getElementById("state");
  try {
    const health = await (await fetch("/health")).json();
    const models = health.models.length;
    const workers = health.instances.length;
    state.textContent = health.message || `${models} model${models === 1 ? "" : "s"}, ${workers} worker${workers === 1 ? "" : "s"}`;
    state.className = health.status === "healthy" ? "good" : "bad";
    await showModels();
  } catch {
    state.textContent = "the frontend does not answer";
    state.className = "bad";
  }
  setTimeout(look, document.hidden ? 10000 : 2000);
}

addEventListener("hashchange", show);
show();
startChat();
startMesh();
look();
