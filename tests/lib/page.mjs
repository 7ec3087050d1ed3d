// Runs the test of a page of examples/browser in node, and prints what it says: node tests/lib/page.mjs PAGE. It is the
// page's script as it stands, which gets of a browser the address and a body that holds text.
import { readFileSync } from "node:fs";
const [, script] = readFileSync(process.argv[2], "utf8").match(/<script type="module">([^]*)<\/script>/);
const asynchronous = Object.getPrototypeOf(async () => {}).constructor;
const body = { innerHTML: "" };
await new asynchronous("document", "location", script)({ body }, { hash: "#test" });
console.log(body.innerHTML.replace(/<\/?pre>/g, "").trimEnd());
