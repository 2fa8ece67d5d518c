"use strict";
// Everything that the server or a model says is put in as text, never as HTML.
const at = (id) => document.getElementById(id);
const EXAMPLES = {
  none: "Once upon a time",
  instruct: "Convert the following YAML to JSON:\n\nname: Ada Lovelace\nage: 36\nlanguages: [English, French]",
  other: "Hi, my name is Greta",
};
const MAX_TOKENS = 256;
let models = [], asked = null, shownExample = null;

function headers() {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function failure(answer) {
  const body = await answer.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${answer.status}`;
}

async function listModels() {
  at("models-status").textContent = "asking the server";
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    if (!answer.ok) throw new Error(await failure(answer));
    models = (await answer.json()).data;
    at("models-status").textContent = models.length ? "" : "no model is there yet; load this page again in a moment";
  } catch (error) {
    models = [];
    at("models-status").textContent = error.message;
  }
  const rows = models.map((card) => {
    const row = document.createElement("tr");
    const cells = [card.id, card.context_length?.toLocaleString("en"), card.prompt_style, card.licence, card.state ?? ""];
    for (const cell of cells) row.insertCell().textContent = cell;
    return row;
  });
  at("models").tBodies[0].replaceChildren(...rows);
  at("models").hidden = !rows.length;
  const before = at("model").value;
  at("model").replaceChildren(...models.map((card) => new Option(card.id, card.id)));
  if (models.some((card) => card.id === before)) at("model").value = before;
  chooseExample();
}

function chosen() {
  return models.find((card) => card.id === at("model").value);
}

function chooseExample() {
  const card = chosen();
  if (card && (at("prompt").value === "" || at("prompt").value === shownExample)) {
    shownExample = EXAMPLES[card.prompt_style] ?? EXAMPLES.other;
    at("prompt").value = shownExample;
  }
  showCurl();
}

function request() {
  const card = chosen(), text = at("prompt").value;
  const own = { model: card?.id ?? "", temperature: 0, max_tokens: MAX_TOKENS };
  return card?.prompt_style === "none"
    ? ["v1/completions", { ...own, prompt: text }]
    : ["v1/chat/completions", { ...own, messages: [{ role: "user", content: text }] }];
}

function showCurl() {
  const [path, body] = request();
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = at("key-form").hidden ? "" : '-H "authorization: Bearer $KEY" ';
  const url = new URL(path, document.baseURI).href;
  at("curl").textContent = `curl -s ${url} ${key}-H 'content-type: application/json' -d '${json}'`;
}

function choiceOf(event) {
  if (event.error) throw new Error(event.error.message);
  return event.choices?.[0] ?? {};
}

// Why the answer ended, by OpenAI's name. A stream without [DONE] was cut.
async function answerInto(place, answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", reason = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server ended the stream in the middle, so the answer is not complete; send it again");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return reason;
      if (!line.startsWith("data: ")) continue;
      const choice = choiceOf(JSON.parse(line.slice(6)));
      place.append(choice.text ?? choice.delta?.content ?? "");
      reason = choice.finish_reason ?? reason;
    }
  }
}

async function send(event) {
  event.preventDefault();
  if (asked || !chosen()) return;
  asked = new AbortController();
  at("answer").textContent = "";
  at("try-status").textContent = "";
  at("send").disabled = true;
  at("stop").hidden = false;
  const [path, body] = request(), signal = asked.signal;
  try {
    const answer = await fetch(path, {
      method: "POST", headers: headers(), signal, body: JSON.stringify({ ...body, stream: true }),
    });
    if (!answer.ok) throw new Error(await failure(answer));
    const reason = await answerInto(at("answer"), answer);
    const empty = at("answer").textContent ? "" : "the answer is empty";
    at("try-status").textContent = reason === "length" ? `cut at ${MAX_TOKENS} tokens` : empty;
  } catch (error) {
    at("try-status").textContent = signal.aborted ? "stopped" : error.message;
  } finally {
    asked.abort();  // after an error the server may still be writing
    asked = null;
    at("send").disabled = false;
    at("stop").hidden = true;
  }
}

at("key-form").addEventListener("submit", (event) => { event.preventDefault(); listModels(); });
at("try").addEventListener("submit", send);
at("stop").addEventListener("click", () => asked?.abort());
at("model").addEventListener("change", chooseExample);
at("prompt").addEventListener("input", showCurl);
if (at("key-form").hidden) listModels();
else at("models-status").textContent = "this server has keys; give yours above";
