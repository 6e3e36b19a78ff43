// Draws charts, and adds keyboard shortcuts to the SQL editor. Everything else works without this script.
"use strict";

async function draw(place) {
  try {
    const response = await fetch(place.dataset.spec, { headers: { accept: "application/json" } });
    const spec = await response.json();
    if (!response.ok) throw new Error(spec.error);
    if (spec.nothing) {
      place.closest("figure").hidden = true;
      place.dataset.state = "hidden";
      return;
    }
    const quiet = vega.logger(vega.Error);
    // With ast and the interpreter, because Vega otherwise compiles expressions by eval, which this site's policy forbids.
    const runtime = vega.parse(vegaLite.compile(spec, { logger: quiet }).spec, null, { ast: true });
    const canvas = document.createElement("div");
    const view = new vega.View(runtime, { expr: vega.expressionInterpreter, renderer: "svg", container: canvas, hover: true });
    await view.runAsync();
    place.replaceChildren(canvas);
    place.dataset.state = "drawn";
  } catch (error) {
    const told = document.createElement("p");
    told.className = "empty";
    told.textContent = error.message;
    place.replaceChildren(told);
    place.dataset.state = "empty";
  }
}

async function drawAll() {
  // One after the other, so that a page does not use all workers of the server.
  for (const place of document.querySelectorAll("[data-spec]")) await draw(place);
}

function edit(editor) {
  editor.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) editor.form.requestSubmit();
  });
  for (const button of document.querySelectorAll("[data-insert]")) {
    button.addEventListener("click", () => {
      editor.setRangeText(button.dataset.insert, editor.selectionStart, editor.selectionEnd, "end");
      editor.focus();
    });
  }
}

const editor = document.getElementById("sql");
if (editor) edit(editor);
drawAll();
