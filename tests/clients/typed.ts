// A client whose types are made from the OpenAPI document by openapi-typescript: node typed.js URL PICTURE
import { readFileSync } from "node:fs";
import assert from "node:assert";
import createClient from "openapi-fetch";
import type { paths } from "./schema.js";

const [url, picture] = process.argv.slice(2);
const image = `data:image/jpeg;base64,${readFileSync(picture).toString("base64")}`;
const client = createClient<paths>({ baseUrl: url });

const health = await client.GET("/health-check");
assert.strictEqual(health.data?.status, "READY");
const made = await client.POST("/predictions", { body: { id: "typed", input: { image, task: "image_captioning" } } });
assert.match(String(made.data?.output), /^Caption: /);
const kept = await client.GET("/predictions/{prediction_id}", { params: { path: { prediction_id: "typed" } } });
assert.strictEqual(kept.data?.output, made.data?.output);
const unknown = await client.GET("/predictions/{prediction_id}", { params: { path: { prediction_id: "none" } } });
assert.match(unknown.error && "detail" in unknown.error ? String(unknown.error.detail) : "", /No prediction/);
