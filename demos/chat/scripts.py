"""What the chat page does in the browser: saved conversations, downloads, the end of an answer. JavaScript, as strings.

Conversations are saved there and nowhere else.
"""

import json

try:
    from demos import mpt_page
except ImportError:  # a copied Space has the module beside it
    import mpt_page  # type: ignore[no-redef]

ID = "conversation-id"  # of the element that holds the id of the conversation on the page
# Made in the browser: the conversation needs no file on the server to become one here.
DOWNLOAD = """([name, text]) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""
# In the browser too, as a part of each function below. gr.BrowserState would write what this tab once read: of two tabs
# the last would delete what the other has saved. `localStorage` is read and written in one step here.
STORE = """
    const read = () => {
        try { return JSON.parse(localStorage.getItem("mpt-chat")) || []; } catch { return []; }
    };
    const write = (kept) => {  // a browser keeps about 5 MB for a site: the oldest make room, all where it keeps none
        for (;;) {
            try { localStorage.setItem("mpt-chat", JSON.stringify(kept)); return; } catch { if (!kept.pop()) return; }
        }
    };
    const plain = (turns) => turns.map(({ role, content, note }) => ({ role, content, note }));"""
READ = f"() => {{{STORE} return [read()]; }}"
OPEN = f"(chosen) => {{{STORE} return [chosen, read()]; }}"
SAVE = f"""(turns, conversation, system) => {{{STORE}
    const others = read().filter((each) => each.id !== conversation);
    const entry = {{ id: conversation, system, turns: plain(turns) }};
    const kept = conversation && turns.length ? [entry, ...others] : others;
    kept.length = Math.min(kept.length, 30);
    write(kept);
    return [kept];
}}"""
# Of the thread's own script: what has come of an answer is kept when the tab is left in the middle of it. The id is read
# where the page holds it, and only what goes on from the saved turns replaces them.
KEEP = f"""{STORE}
addEventListener("pagehide", () => {{
    const conversation = document.querySelector("#{ID} :is(textarea, input)").value, turns = plain(props.value);
    const kept = read(), entry = kept.find((each) => each.id === conversation);
    const goesOn = (turn, n) => turn.role === turns[n]?.role && turn.content === turns[n].content;
    if (entry && turns.length > entry.turns.length && entry.turns.every(goesOn)) {{
        entry.turns = turns;
        write(kept);
    }}
}});
"""
# An empty conversation: the turns, their id, the choice among the saved ones, the line below, Send and Stop.
_BLANK = """[[], "", { __type__: "update", value: null }, "",
        { __type__: "update", visible: true, interactive: true }, { __type__: "update", visible: false }]"""
START_NEW = f"() => {_BLANK}"
# What was deleted is handed to the page, which can bring it back as long as it is open.
DELETE = f"""(turns, conversation, system) => {{{STORE}
    const kept = read().filter((each) => each.id !== conversation);
    write(kept);
    return [{{ id: conversation, system, turns: plain(turns) }}, kept, ...{_BLANK}];
}}"""
# After an answer, also a cancelled one. In the browser, because a function of this process could come back after "New
# conversation" has emptied the page, and bring the old one back.
FINISH = f"""(turns) => {{
    const last = turns.at(-1), send = {{ __type__: "update", visible: true, interactive: true }};
    let under = null;
    if (last?.role === "assistant" && !last.note) {{
        turns = [...turns.slice(0, -1), {{ ...last, note: "Stopped." }}];
        under = {json.dumps(mpt_page.quiet("Stopped."))};
    }} else if (last?.role === "user") {{
        const note = "Stopped before the first word.";
        turns = [...turns, {{ role: "assistant", content: note, note, html: `<p>${{note}}</p>` }}];
    }}
    return [turns, under ?? {{ __type__: "update" }}, false, send, {{ __type__: "update", visible: false }}];
}}"""
