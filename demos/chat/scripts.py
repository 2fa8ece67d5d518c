"""What the chat page does in the browser: saved conversations, downloads, what comes of an answer. JavaScript, as strings.

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
    const plain = (turns) => turns.map(({ role, content, note }) => ({ role, content, note }));
    const keep = (conversation, shown) => {  // what goes on from the saved turns replaces them
        const kept = read(), turns = plain(shown), entry = kept.find((each) => each.id === conversation);
        const goesOn = (turn, n) => turn.role === turns[n]?.role && turn.content === turns[n].content;
        if (entry && turns.length > entry.turns.length && entry.turns.every(goesOn)) {
            entry.turns = turns;
            write(kept);
        }
    };"""
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
# What has come of an answer is kept when another conversation takes its place, and when the tab is left.
KEEP = f"(turns, conversation) => {{{STORE} keep(conversation, turns); return []; }}"
KEEP_AT_THE_END = f"""{STORE}
addEventListener("pagehide", () => keep(document.querySelector("#{ID} :is(textarea, input)").value, props.value));
"""  # a part of the thread's own script
_SAME = '{ __type__: "update" }'
_AT_REST = '{ __type__: "update", visible: true, interactive: true }, { __type__: "update", visible: false }'
# An empty conversation: the turns, their id, the choice among the saved ones, the line below, no answer under way, Send
# and Stop.
_BLANK = f'[[], "", {{ __type__: "update", value: null }}, "", "", {_AT_REST}]'
START_NEW = f"() => {_BLANK}"
# What was deleted is handed to the page, which can bring it back as long as it is open.
DELETE = f"""(turns, conversation, system) => {{{STORE}
    const kept = read().filter((each) => each.id !== conversation);
    write(kept);
    return [{{ id: conversation, system, turns: plain(turns) }}, kept, ...{_BLANK}];
}}"""
# What has come of an answer: into the thread, as long as that answer is under way. Gradio hands a page what a cancelled
# event sent before it ended, and a slow one gets it when other turns stand there: it would put them away, also where the
# page saves them. Both functions give the turns, the line below, the answer under way, Send and Stop.
_WITH = """
    const withWhatCame = (arrived, answering, turns) => {
        const asked = turns.at(-1)?.role === "assistant" ? turns.slice(0, -1) : turns;
        return arrived?.of === answering && arrived.said ? [...asked, arrived.said] : turns;
    };"""
SHOW = f"""(arrived, answering, turns) => {{{_WITH}
    if (!answering || arrived?.of !== answering) return Array(5).fill({_SAME});
    const rest = arrived.is_last ? ["", {_AT_REST}] : Array(3).fill({_SAME});
    return [withWhatCame(arrived, answering, turns), arrived.under, ...rest];
}}"""
# After an answer that was cancelled, or failed in this process.
END = f"""(arrived, answering, turns) => {{{_WITH}
    if (!answering) return Array(5).fill({_SAME});
    turns = withWhatCame(arrived, answering, turns);
    const last = turns.at(-1), rest = ["", {_AT_REST}];
    if (last?.role === "assistant")
        return [[...turns.slice(0, -1), {{ ...last, note: "Stopped." }}], {json.dumps(mpt_page.quiet("Stopped."))}, ...rest];
    const note = "Stopped before the first word.";
    return [[...turns, {{ role: "assistant", content: note, note, html: `<p>${{note}}</p>` }}], {_SAME}, ...rest];
}}"""
