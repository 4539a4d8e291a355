// The recorder of the live tab. Run by gr.HTML when it loads, which gives `element`, `props`, `trigger` and `server`.
//
// Sound is collected while a request is on its way and goes out with the next one: on a slow machine or line requests grow longer, up to
// a limit, and none of the sound is lost. While one takes long, the server is told that the microphone is still on. Nothing is stored
// here or sent elsewhere.

const SEND_EVERY_S = 0.5;
const SEND_AT_MOST_S = 15; // in one request
const STILL_ON_EVERY_MS = 1000; // the server takes a microphone for gone after three
const LOOK_EVERY_MS = 400;
const RATE = 16000; // Hz, all that the model hears: a third of what most microphones would send
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

let recording = null; // {stream, context, ticking}
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
    let stream = null;
    try {
        stream = await navigator.mediaDevices.getUserMedia({ audio: true });
        // Some browsers connect a microphone at its own rate only.
        const context = await connected(stream, { sampleRate: RATE }).catch(() => connected(stream, {}));
        for (const track of stream.getTracks()) track.addEventListener("ended", () => gone(stream));
        recording = { stream, context, ticking: setInterval(stillOn, STILL_ON_EVERY_MS) };
        turn += 1;
        tell("");
        show();
        if (!stream.active) gone(stream);
    } catch (error) {
        if (stream) release(stream);
        tell(`The microphone could not be used: ${error.message}. Allow it in the browser, and press Record again.`);
    }
    isStarting = false;
}

async function connected(stream, options) {
    const context = new AudioContext(options);
    const address = URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" }));
    try {
        await context.audioWorklet.addModule(address);
        const collector = new AudioWorkletNode(context, "collector", { channelCount: 1, channelCountMode: "explicit" });
        collector.port.onmessage = (event) => take(event.data, context.sampleRate);
        context.createMediaStreamSource(stream).connect(collector);
        return context;
    } catch (error) {
        context.close();
        throw error;
    } finally {
        URL.revokeObjectURL(address);
    }
}

function release(stream) {
    for (const track of stream.getTracks()) track.stop();
}

function gone(stream) {
    if (!recording || recording.stream !== stream) return;
    tell("The microphone is gone. Press Record when it is back.");
    stop();
}

function stillOn() {
    if (!page.busy) return;
    const mine = turn;
    server
        .live_on({ key })
        .then((answer) => {
            if (mine === turn && answer.html) words(answer.html);
        })
        .catch(() => {}); // the request that takes long tells it
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
    const sound = encoded(next(SEND_AT_MOST_S * rate));
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

function next(most) {
    let taken = 0;
    let count = 0;
    while (count < blocks.length && (count === 0 || taken + blocks[count].length <= most)) taken += blocks[count++].length;
    waiting -= taken;
    return blocks.splice(0, count);
}

async function stop() {
    if (!recording) return;
    const { stream, context, ticking } = recording;
    const rate = context.sampleRate;
    recording = null;
    const mine = (turn += 1);
    clearInterval(ticking);
    release(stream);
    context.close();
    meter.style.width = "0";
    show();
    try {
        await sending;
        while (mine === turn && blocks.length) await send(rate, mine);
        for (let answer = await server.live_finish({ key }); mine === turn; answer = await server.live_finish({ key })) {
            if (answer.problem) return tell(answer.problem);
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
    const answer = await server.live_clear({ key });
    if (answer.problem) return tell(answer.problem);
    words(answer.html);
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
