"""What the offline model knows by heart: a few prepared explanations with an example each. Only data and how to look it up."""

from __future__ import annotations

import re
from typing import NamedTuple


class Topic(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    explanation: str
    example: str


def _topic(name: str, pattern: str, explanation: str, example: str) -> Topic:
    return Topic(name, re.compile(pattern, re.IGNORECASE), explanation.strip(), example.strip())


TOPICS = (
    _topic(
        "closures",
        r"\bclosures?\b",
        """
A closure is a function that retains access to variables from its enclosing scope, even after the outer function has returned.

In JavaScript every function is created together with a reference to the scope around it, so the inner function does not get a copy \
of those variables: it shares them, and sees every later change.

```javascript
function makeCounter() {
  let count = 0;          // lives on after makeCounter has returned
  return () => ++count;   // this arrow function closes over `count`
}

const next = makeCounter();
console.log(next()); // 1
console.log(next()); // 2
```

Closures are how callbacks remember their context, and how a module keeps something private.
""",
        """
Here is a closure that keeps something private, a bank account whose balance nobody can reach from outside:

```javascript
function openAccount(initial) {
  let balance = initial;            // only the functions below can see it

  return {
    deposit(amount) {
      balance += amount;
      return balance;
    },
    get balance() {
      return balance;
    },
  };
}

const mine = openAccount(100);
const yours = openAccount(5);
mine.deposit(50);
console.log(mine.balance);  // 150
console.log(yours.balance); // 5: each call made a scope of its own
```

Step by step: `openAccount` runs and creates `balance`. The object it returns holds two functions that close over that variable. \
`openAccount` has long returned when `deposit` is called, and still `deposit` changes the same `balance` that the getter reads. \
The second call created a second, independent `balance`.
""",
    ),
    _topic(
        "promises and async/await",
        r"\bpromises?\b|\basync\b|\bawait\b",
        """
A promise is an object that stands for a value that is not there yet: it is *pending*, and later becomes either *fulfilled* with a \
value or *rejected* with an error, once and for good. `async`/`await` is the syntax that lets you write code over promises as if it \
were sequential: `await` suspends the function, not the program, until the promise is settled.
""",
        """
```javascript
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function main() {
  console.log("one");
  await wait(100);          // other code runs meanwhile
  console.log("two");
}

main().catch((error) => console.error("failed:", error));
```

`main()` returns a promise at once; "two" is printed 100 ms later. An error thrown inside rejects that promise, and `catch` sees it.
""",
    ),
    _topic(
        "let, const and var",
        r"\b(?:let|const)\b.*\b(?:var|const|let)\b|\bhoist",
        """
`let` and `const` belong to the block they stand in and cannot be used before their line; `const` cannot be assigned again (the object it \
names can still change). `var` belongs to the whole function and is hoisted: it exists, as `undefined`, from the function's first line. \
Use `const` by default, `let` where the value changes, `var` not at all.
""",
        """
```javascript
for (var i = 0; i < 3; i++) setTimeout(() => console.log("var", i)); // 3 3 3: one i for all
for (let j = 0; j < 3; j++) setTimeout(() => console.log("let", j)); // 0 1 2: one j per turn
```
""",
    ),
    _topic(
        "TypeScript generics",
        r"\bgenerics?\b",
        """
A generic is a type with a parameter: you write a function or a class once, and the compiler keeps track of which type it is used with, \
so nothing is lost to `any`.
""",
        """
```typescript
function first<T>(items: readonly T[]): T | undefined {
  return items[0];
}

const n = first([1, 2, 3]);    // number | undefined
const s = first(["a", "b"]);   // string | undefined
```
""",
    ),
    _topic(
        "interfaces and type aliases",
        r"\binterfaces?\b.*\btypes?\b|\btypes?\b.*\binterfaces?\b",
        """
In TypeScript both name a shape. An `interface` describes objects, can be extended and can be declared again to add to it; a `type` alias \
can name anything, unions and tuples included, but only once. Use `interface` for public object shapes, `type` for everything else.
""",
        """
```typescript
interface User { id: number; name: string }
interface Admin extends User { rights: string[] }

type Id = string | number;          // only a type alias can do this
type Result<T> = { ok: true; value: T } | { ok: false; error: Error };
```
""",
    ),
    _topic(
        "the event loop",
        r"\bevent loop\b",
        """
JavaScript runs one piece of code at a time. Work that waits (timers, network, files) is handed to the host; when it is done, its callback \
is put in a queue. The event loop takes the next callback when the stack is empty, and before each one it empties the queue of promise \
reactions (microtasks).
""",
        """
```javascript
setTimeout(() => console.log("3: timer"));
Promise.resolve().then(() => console.log("2: microtask"));
console.log("1: this code first");
```
""",
    ),
)


def find_topic(text: str) -> Topic | None:
    return next((topic for topic in TOPICS if topic.pattern.search(text)), None)
