"""The conversation on the page: a gr.HTML of turns, with what can be done to each, and what it does in the browser.

gr.Chatbot reads a model's HTML as HTML: it deletes what it does not allow (`<old>`) and fetches images. A turn brings the
HTML that `turns.py` made of its text. It is no subclass of gr.HTML, beside which Gradio would write a `.pyi` file.
"""

import gradio as gr

try:
    from demos import mpt_page
    from demos.chat.scripts import KEEP_AT_THE_END
except ImportError:  # a copied Space has the modules beside it
    import mpt_page  # type: ignore[no-redef]
    from scripts import KEEP_AT_THE_END  # type: ignore[no-redef]

# Gradio evaluates it as JavaScript's template. No other text of a turn stands in it than its `html`.
TEMPLATE = """
<div class="thread" role="log" aria-label="Conversation" tabindex="0">${(value || []).map((turn, n, turns) => `
  <article class="turn ${turn.role}" aria-label="${turn.role === "user" ? "You" : "Model"}">
    <div class="said markdown">${turn.html}</div>
    <div class="actions">
      <button data-does="copy" data-at="${n}">Copy</button>
      ${turn.role === "user" ? `<button data-does="edit" data-at="${n}">Edit</button>` : ""}
      ${n === turns.length - 1 ? `<button data-does="retry" data-at="${n}">Retry</button>
      <button data-does="undo" data-at="${n}">Undo</button>` : ""}
    </div>
  </article>`).join("")}</div>"""

# Who has scrolled up stays there while an answer grows; a new question brings the end into view.
JAVASCRIPT = """
const thread = () => element.querySelector(".thread");
const toTheEnd = () => (thread().scrollTop = thread().scrollHeight);
let follows = true, asked = 0;
new ResizeObserver(() => follows && toTheEnd()).observe(thread());
element.addEventListener("scroll", () => {
  const box = thread();
  follows = box.scrollTop + box.clientHeight > box.scrollHeight - 40;
}, true);
watch("value", () => {
  const n = props.value.filter((turn) => turn.role === "user").length;
  if (follows || n > asked) toTheEnd();
  asked = n;
});
const edit = (article, at) => {
  const said = article.querySelector(".said"), form = document.createElement("form"), before = said.cloneNode(true);
  form.innerHTML = '<textarea aria-label="Edited message"></textarea><button>Send again</button>'
    + '<button type="button">Cancel</button>';
  const [box, , cancel] = form.children;
  box.value = props.value[at].content;
  said.replaceWith(form);
  box.focus();
  const done = () => form.replaceWith(before);
  cancel.onclick = done;
  form.onsubmit = (event) => {
    event.preventDefault();
    done();
    if (box.value.trim()) trigger("edit", { index: at, value: box.value, previous_value: props.value[at].content });
  };
  box.onkeydown = (event) => {
    if (event.key === "Escape") cancel.click();
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  };
};
// A browser has `navigator.clipboard` on this machine and over HTTPS only, and may refuse it.
const copy = async (text) => {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* the older way follows */ }
  const box = Object.assign(document.createElement("textarea"), { value: text, readOnly: true }), before = document.activeElement;
  document.body.append(box);
  box.select();
  const isCopied = document.execCommand("copy");
  box.remove();
  before?.focus({ preventScroll: true });
  return isCopied;
};
element.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-does]");
  if (!button) return;
  const { does } = button.dataset, at = Number(button.dataset.at), { content } = props.value[at];
  if (does === "edit") edit(button.closest("article"), at);
  else if (does !== "copy") trigger(does, { index: at, value: content });
  else {
    button.textContent = (await copy(content)) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
});
"""


def thread() -> gr.HTML:
    """A component that holds turns; events `retry`, `edit` and `undo`, with gr.RetryData, gr.EditData and gr.UndoData."""
    return gr.HTML(
        [],
        html_template=TEMPLATE,
        js_on_load=JAVASCRIPT + KEEP_AT_THE_END,
        elem_id="conversation",
        scale=1,
        **mpt_page.BARE,
    )
