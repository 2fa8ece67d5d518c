"""What the chat page does in the browser: saved conversations, downloads, the end of an answer. JavaScript, as strings.

Conversations are saved there and nowhere else.
"""

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
    };"""
READ = f"() => {{{STORE} return [read()]; }}"
OPEN = f"(chosen) => {{{STORE} return [chosen, read()]; }}"
SAVE = f"""(turns, conversation, system) => {{{STORE}
    const others = read().filter((each) => each.id !== conversation);
    const kept = conversation && turns.length ? [{{ id: conversation, system, turns }}, ...others] : others;
    kept.length = Math.min(kept.length, 30);
    write(kept);
    return [kept];
}}"""
# After an answer, also a cancelled one. In the browser, because a function of this process could come back after "New
# conversation" has emptied the page, and bring the old one back.
FINISH = """(turns) => {
    const last = turns.at(-1);
    let note = last?.metadata?.log ?? "";
    if (last?.role === "assistant" && !note) {
        note = "Stopped.";
        turns = [...turns.slice(0, -1), { ...last, metadata: { log: note } }];
    } else if (last?.role === "user") {
        note = "Stopped before the first word.";
        turns = [...turns, { role: "assistant", content: [{ type: "text", text: note }], metadata: { log: note } }];
        note = "";
    }
    const send = { __type__: "update", visible: true, interactive: true };
    return [turns, note, false, send, { __type__: "update", visible: false }];
}"""
