// Replicate's own client asks this server: node replicate.mjs URL PICTURE
import { readFileSync } from "node:fs";
import assert from "node:assert";
import Replicate from "replicate";

const [url, picture] = process.argv.slice(2);
const image = `data:image/jpeg;base64,${readFileSync(picture).toString("base64")}`;
const replicate = new Replicate({ auth: "not needed", baseUrl: url });
const model = `you/blip:${"0".repeat(64)}`; // run() wants a name; the server has one model, whatever it is called

assert.match(await replicate.run(model, { input: { image } }), /^Caption: /);
const question = { task: "visual_question_answering", question: "what color is the circle?" };
assert.match(await replicate.run(model, { input: { image, ...question } }), /^Answer: /);
assert.match(await replicate.run(model, { input: { image }, wait: { mode: "poll" } }), /^Caption: /);
await assert.rejects(replicate.run(model, { input: { image, task: "image_text_matching" } }), /caption/);
