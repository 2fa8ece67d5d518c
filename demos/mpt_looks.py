"""How the pages of all Spaces look: colours, fonts, layout, the tab's icon; and what a page forbids a browser to fetch.

The file is copied beside each Space's `app.py`.
"""

import base64
from pathlib import Path
from typing import Any

import gradio as gr

# Gradio's own `css` would let the rules for phones reach its main column only, so this goes into the page's head.
CSS = """
.gradio-container {--text: var(--body-text-color); --soft: color-mix(in srgb, var(--body-text-color) 76%, transparent)}
.gradio-container .fillable {width: 100%; max-width: 1120px !important; margin: 0 auto; padding: 0.75rem 1.25rem; box-sizing: border-box}
.gradio-container .nav-holder {padding: 0 !important}
.gradio-container nav.fillable {padding: 0.3rem 1.25rem}
.bare, .bare .html-container {padding: 0 !important}
.mpt-header {align-items: center; gap: 0.5rem 1.5rem !important}
.mpt-header h1 {font-size: 1.375rem; font-weight: 700; margin: 0; line-height: 1.3; color: var(--text)}
.mpt-header h1 + p {margin: 0; color: var(--soft)}
.mpt-header .form {flex-direction: row; flex-wrap: wrap; gap: 0.5rem; border: 0; background: none; box-shadow: none;
  justify-content: flex-end; overflow: visible; flex: 0 1 auto !important; width: auto; min-width: 0 !important}
.mpt-header .form .block {padding: 0; flex: none !important; width: max-content; border: 0; background: none; box-shadow: none; overflow: visible}
.mpt-header .form .container {display: flex; align-items: center; gap: 0.5rem}
.mpt-header .form .container > .wrap {width: min(15.5rem, 56vw)} .mpt-header .form span {margin: 0; white-space: nowrap}
.mpt-state, .mpt-quiet {font-size: 0.875rem; line-height: 1.5; color: var(--soft); overflow-wrap: anywhere; margin: 0}
.mpt-state::before {content: ""; display: inline-block; width: 0.6rem; height: 0.6rem; border-radius: 50%;
  margin-right: 0.45rem; background: #15803d}
.mpt-state b {color: var(--text); font-weight: 600}
.mpt-state.down {color: var(--text)} .mpt-state.down::before {background: #dc2626; border-radius: 0}
.mpt-box {margin: 0; padding: 0.5rem 0.75rem; border-style: solid; border-width: 0 0 0 4px; border-radius: 4px;
  line-height: 1.45; background: var(--background-fill-secondary); color: var(--text); overflow-wrap: anywhere}
.mpt-trouble {border-color: #dc2626}
.mpt-box code, .mpt-state code, .mpt-quiet code {font-family: var(--font-mono); font-size: 0.92em}
.markdown :is(p, ul, ol, pre, table, blockquote) {margin: 0.5rem 0}
.markdown > :first-child {margin-top: 0} .markdown > :last-child {margin-bottom: 0}
.markdown :is(ul, ol) {padding-left: 1.4rem} .markdown ul {list-style: disc} .markdown ol {list-style: decimal}
.markdown :is(h1, h2, h3) {font-weight: 700; margin: 0.75rem 0 0.25rem}
.markdown a {text-decoration: underline; color: inherit}
.markdown :is(pre, code) {font-family: var(--font-mono); font-size: 0.92em; border-radius: 4px;
  background: var(--background-fill-secondary)}
.markdown code {padding: 0.1em 0.3em} .markdown pre {padding: 0.6rem 0.75rem; overflow-x: auto}
.markdown pre code {padding: 0} .markdown math[display=block] {overflow-x: auto}
.markdown :is(th, td) {border: 1px solid var(--border-color-primary); padding: 0.2rem 0.5rem}
.markdown blockquote {border-left: 3px solid var(--border-color-primary); padding-left: 0.75rem}
.gradio-container :is(button.lg, button.md, button.sm, .gallery-item) {min-height: 40px}
@media (pointer: coarse) {.mpt-keys, #instruction .info-text, #prompt .info-text {display: none}}
@media (max-width: 600px), (pointer: coarse) {
  .gradio-container :is(.icon-button, .reset-button, .toggle-button, .download-link) {min-width: 40px; min-height: 40px;
    justify-content: center; align-items: center}
  .gradio-container :is(.label-wrap, input[type="number"]) {min-height: 40px}
  .gradio-container .label-wrap {align-items: center}
  .gradio-container input[type="checkbox"] {width: 24px; height: 24px}
}
@media (max-width: 600px) {
  .gradio-container .main.fillable {padding: 0.5rem 0.75rem}
  .gradio-container nav.fillable {padding: 0.2rem 0.25rem; flex-wrap: nowrap !important; gap: 0; overflow-x: auto;
    justify-content: flex-start}
  .gradio-container nav.fillable a {white-space: nowrap; padding: 0.5rem 0.3rem; font-size: 0.8125rem}
  .mpt-header {flex-direction: row; flex-wrap: wrap; justify-content: space-between}
  .mpt-header > .block {min-width: 0 !important; flex: 0 1 auto; width: auto}
  .mpt-header h1 + p {display: none}
}
"""
# The first line holds whatever a model's text becomes: no picture, frame or name of another machine is asked for before
# a click. The script: a touch keyboard has no Shift+Enter for a new line, so Enter is one there.
_HEAD = """
<meta http-equiv="Content-Security-Policy" content="img-src 'self' data: blob:; media-src 'self' blob:; frame-src 'none'; object-src 'none'">
<meta http-equiv="x-dns-prefetch-control" content="off">
<script>
for (const press of ["keydown", "keypress"]) addEventListener(press, (event) => {
  if (event.key === "Enter" && event.target.tagName === "TEXTAREA" && matchMedia("(pointer: coarse)").matches)
    event.stopImmediatePropagation();
}, true);
</script>
"""


def head() -> str:
    """What stands in the head of each page."""
    return f"<style>{CSS}</style>{_icon()}{_HEAD}"


def _icon() -> str:
    """The icon of the tab. A browser asks for Gradio's `favicon_path` at the root, where another server may be."""
    data = base64.b64encode((Path(__file__).parent / "favicon.png").read_bytes()).decode()
    return f'<link rel="icon" type="image/png" href="data:image/png;base64,{data}">'


def theme() -> gr.themes.Base:
    """Gradio's own, where it has them: the machine's fonts, and colours whose contrast is enough."""
    quiet_text: dict[str, Any] = {}
    for name in (
        "body_text_color_subdued",
        "block_info_text_color",
        "block_label_text_color",
        "block_title_text_color",
        "input_placeholder_color",
    ):
        quiet_text |= {name: "#4b5563", f"{name}_dark": "#cbd5e1"}
    blue, darker = "#1d4ed8", "#1e40af"
    return gr.themes.Default(
        primary_hue="blue",
        secondary_hue="blue",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        button_primary_background_fill=blue,
        button_primary_background_fill_dark=blue,
        button_primary_background_fill_hover=darker,
        button_primary_background_fill_hover_dark=darker,
        button_primary_text_color="white",
        **quiet_text,
    )
