"""A box to write in that shows, behind its own text, how likely each token was: a gr.HTML.

A textarea cannot colour its text. So a second layer with the same letters lies behind it, and what is behind the caret
is told in a popover: by a tap, a click or the arrow keys.
"""

import gradio as gr

try:
    from demos import mpt_page
except ImportError:  # a copied Space has the module beside it
    import mpt_page  # type: ignore[no-redef]

# Gradio evaluates it as JavaScript's template. The text stands in it escaped.
TEMPLATE = """
<label for="coloured-text">${label}</label><p class="mpt-quiet">${info}</p>
<div class="field"><div class="layers"><div class="behind" aria-hidden="true">${(() => {
  const plain = (text) => text.replace(/[&<>]/g, (sign) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[sign]);
  let at = 0, html = "";
  for (const { start, end, share } of value.tokens) {
    html += plain(value.text.slice(at, start)) + `<span style="--share: ${Number(share)}">`
      + plain(value.text.slice(start, end)) + "</span>";
    at = end;
  }
  return html + plain(value.text.slice(at));
})()}&#8203;</div><textarea id="coloured-text" spellcheck="false"></textarea></div></div>
<div class="odds" role="status" hidden></div>"""

CSS = """
{position: relative}
label {display: block; font-weight: 600; color: var(--body-text-color)}
.field {max-height: 60vh; overflow-y: auto; border: 1px solid var(--border-color-primary); border-radius: 8px; margin-top: 4px;
  background: var(--background-fill-primary)}
.field:focus-within {outline: 2px solid #2563eb; outline-offset: 1px}
.layers {position: relative; min-height: 14rem; display: grid}
.layers > * {padding: 0.75rem; font: 1rem/1.7 var(--font-mono); white-space: pre-wrap; overflow-wrap: anywhere;
  letter-spacing: 0; tab-size: 4; border: 0; margin: 0; width: 100%; box-sizing: border-box}
.behind {color: transparent}
.behind span {border-radius: 3px; background: rgb(59 130 246 / calc(0.06 + 0.5 * var(--share)))}
.behind span.at {outline: 2px solid var(--body-text-color)}
textarea {position: absolute; inset: 0; height: 100%; resize: none; overflow: hidden; background: none; outline: none;
  color: var(--body-text-color); box-shadow: none}
.odds {position: absolute; z-index: 5; max-width: min(24rem, 96%); padding: 0.5rem 0.75rem; border-radius: 8px; pointer-events: none;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary); color: var(--body-text-color);
  font-size: 0.875rem; line-height: 1.45; box-shadow: 0 4px 12px rgb(0 0 0 / 0.25); overflow-wrap: anywhere}
.odds[hidden] {display: none}
"""

JAVASCRIPT = """
const box = element.querySelector("textarea"), odds = element.querySelector(".odds");
const spans = () => element.querySelectorAll(".behind span");
const show = (text) => { if (box.value !== text) box.value = text; };
const hide = () => { odds.hidden = true; element.querySelector(".at")?.classList.remove("at"); };
show(props.value.text);
watch("value", () => {
  hide();
  const field = element.querySelector(".field");
  const follows = document.activeElement !== box && box.value !== props.value.text;
  show(props.value.text);
  if (follows) field.scrollTop = field.scrollHeight;
});
// What was typed over is no longer what the model wrote, nor is what follows it.
box.addEventListener("input", () => {
  const before = props.value, text = box.value;
  let same = 0;
  while (same < text.length && text[same] === before.text[same]) same++;
  hide();
  props.value = { text, tokens: before.tokens.filter((token) => token.end <= same) };
});
const tell = () => {
  hide();
  const at = box.selectionStart;
  if (document.activeElement !== box || at !== box.selectionEnd) return;
  const n = props.value.tokens.findIndex((token) => token.start <= at && at < token.end);
  if (n < 0) return;
  const [token, share, others] = props.value.tokens[n].odds, span = spans()[n], where = span.getClientRects()[0];
  span.classList.add("at");
  odds.textContent = `${token}: ${share}` + (others ? `. Others: ${others}` : "");
  odds.hidden = false;
  const frame = element.getBoundingClientRect();
  odds.style.top = `${where.bottom - frame.top + 6}px`;
  odds.style.left = `${Math.max(0, Math.min(where.left - frame.left, frame.width - odds.offsetWidth))}px`;
};
box.addEventListener("click", tell);
box.addEventListener("blur", hide);
element.querySelector(".field").addEventListener("scroll", hide);
box.addEventListener("keyup", (event) => {
  if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) tell();
});
box.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); trigger("submit"); }
});
"""


def coloured_text(text: str, label: str, info: str) -> gr.HTML:
    """A component that holds {"text": ..., "tokens": ...} of `tokens.py`; event `submit`."""
    return gr.HTML(
        {"text": text, "tokens": []}, html_template=TEMPLATE, css_template=CSS, js_on_load=JAVASCRIPT, label=label,
        info=info, elem_id="text", **mpt_page.BARE,
    )  # fmt: skip
