// The recorder of the live tab. Run by gr.HTML when it loads, which gives `element`, `props`, `trigger` and `server`.
//
// Sound is collected while a request is on its way and goes out with the next one: on a slow machine requests grow longer, and none of
// the sound is lost. Nothing is stored here or sent elsewhere.

const SEND_EVERY_S = 0.5;
const LOOK_EVERY_MS = 400;
const WORKLET = `
class Collector extends AudioWorkletProcessor {
    process(inputs) {
        if (inputs[0].length) this.port.postMessage(inputs[0][0].slice());
        return true;
    }
}
registerProcessor("collector", Collector);`;

const button = element.querySelector("button");
const meter = element.querySelector(".wm-live-level i");
const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const page = (window.wmLive = { language: "auto", clear });

let recording = null; // {stream, context}
let isStarting = false;
let blocks = []; // of sound that waits to be sent
let waiting = 0; // samples in them
let turn = 0; // grows with every start, stop and Clear: an answer to an earlier one is no longer shown
let sending = Promise.resolve();

button.addEventListener("click", () => (recording ? stop() : start()));

async function start() {
    if (!navigator.mediaDevices) {
        return tell("The browser gives no microphone to this page. It does so for pages on this machine (localhost) and over https.");
    }
    if (isStarting) return;
    isStarting = true; // not `disabled`: the button would lose the keyboard, and Stop could not be pressed
    try {
        const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
        const context = new AudioContext();
        await context.audioWorklet.addModule(URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" })));
        const collector = new AudioWorkletNode(context, "collector", { channelCount: 1, channelCountMode: "explicit" });
        collector.port.onmessage = (event) => take(event.data, context.sampleRate);
        context.createMediaStreamSource(stream).connect(collector);
        recording = { stream, context };
        turn += 1;
        tell("");
        show();
    } catch (error) {
        tell(`The microphone could not be used: ${error.message}. Allow it in the browser, and press Record again.`);
    }
    isStarting = false;
}

function take(block, rate) {
    if (!recording) return;
    blocks.push(block);
    waiting += block.length;
    const loudest = block.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
    meter.style.width = `${Math.min(100, 130 * Math.sqrt(loudest))}%`;
    if (waiting >= SEND_EVERY_S * rate && !page.busy) send(rate, turn);
}

function send(rate, mine) {
    page.busy = true;
    const sound = encoded(blocks.splice(0));
    waiting = 0;
    sending = server
        .live_hear({ key, rate, sound, language: page.language })
        .then((answer) => {
            if (mine !== turn) return;
            if (answer.html) words(answer.html);
            if (answer.problem) {
                tell(answer.problem);
                stop();
            }
        })
        .catch(() => {
            tell("The connection to the page was lost. What was said last is missing; press Record to go on.");
            if (mine === turn) stop();
        })
        .finally(() => (page.busy = false));
    return sending;
}

async function stop() {
    if (!recording) return;
    const { stream, context } = recording;
    const rate = context.sampleRate;
    recording = null;
    const mine = (turn += 1);
    stream.getTracks().forEach((track) => track.stop());
    context.close();
    meter.style.width = "0";
    show();
    try {
        await sending;
        if (mine === turn && blocks.length) await send(rate, mine);
        for (let answer = await server.live_finish({ key }); mine === turn; answer = await server.live_finish({ key })) {
            words(answer.html);
            if (answer.over) break;
            await new Promise((done) => setTimeout(done, LOOK_EVERY_MS));
        }
    } catch {
        return tell("The connection to the page was lost.");
    }
    if (mine === turn) finished();
}

async function clear() {
    turn += 1;
    blocks = [];
    waiting = 0;
    tell("");
    await sending;
    words((await server.live_clear({ key })).html);
    blocks = [];
    waiting = 0;
    finished();
}

function finished() {
    props.value = key; // what the page asks for the whole text with
    trigger("submit");
}

function words(html) {
    const place = document.querySelector("#live-said .wm-live-place");
    if (place.innerHTML !== html) place.innerHTML = html;
}

function tell(message) {
    element.querySelector(".wm-live-trouble").textContent = message;
}

function show() {
    button.textContent = recording ? "Stop" : "Record";
    button.classList.toggle("on", recording !== null);
}

function encoded(parts) {
    const length = parts.reduce((sum, part) => sum + part.length, 0);
    const samples = new DataView(new ArrayBuffer(2 * length)); // 16 bit, little-endian
    let at = 0;
    for (const part of parts) {
        for (const sample of part) samples.setInt16(2 * at++, Math.round(32767 * Math.max(-1, Math.min(1, sample))), true);
    }
    const bytes = new Uint8Array(samples.buffer);
    let text = "";
    for (let start = 0; start < bytes.length; start += 32768) text += String.fromCharCode(...bytes.subarray(start, start + 32768));
    return btoa(text);
}
