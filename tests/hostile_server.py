"""A chat endpoint that misbehaves in every way but reproducibly: a hash of the request decides.

`HostileServer.paid` is the witness of what was paid: it lists the requests whose answer was sent
whole, one entry per time.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ["drop", "rate limit", "server error", "cut body"]
"""what happens to a first attempt; the second one is answered"""

ANSWERS = {
    "A": "Comparison: A is better.\nPreferred: A",
    "B": 'Comparison: B says "Preferred" things.\nPreferred: "B"',
    "prose": "Both have their merits, and it depends on the reader.",
    "refused": "I'm sorry, but I cannot compare these.",
    "no text": "",
    "both": "Preferred: A\nPreferred: B",
    "long": "Comparison: A is bet",
    "no choices": None,
    "nonsense": "not read",
    "half JSON": "not read",
    "wrong type": "Comparison: fine.\nPreferred: A",
    "drip": "Comparison: fine.\nPreferred: B",
}
REASONS = {
    "prose": "prose",
    "refused": "refusal",
    "no text": "empty",
    "both": "malformed",
    "long": "malformed",
    "no choices": "empty",
    "nonsense": "malformed",
    "half JSON": "malformed",
}
"""why an answer gives no verdict"""

# of 100 requests, how many first meet a fault, and how many get which answer
FAULTY = 12
ODD = [name for name in ANSWERS if name not in "AB"]


def fate(question: str) -> tuple[str | None, str]:
    """The fault of a request's first attempt, or None, and the kind of its answer."""
    number = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8])
    number, faulty = divmod(number, 100)
    number, odd = divmod(number, 100)
    fault = FAULTS[number % len(FAULTS)] if faulty < FAULTY else None
    return fault, (ODD[number % len(ODD)] if odd < 30 else "AB"[number % 2])


class HostileServer(ThreadingHTTPServer):
    """Serves on a free port of this machine while it is a context; `url` is its base URL."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, fate=fate, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fate, self.delay, self.lock = fate, delay, threading.Lock()
        self.paid, self.attempts, self.headers = [], Counter(), []
        self.active = self.most_active = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_) -> None:
        """A client that is gone is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with server.lock:
            server.active += 1
            server.most_active = max(server.active, server.most_active)
            server.attempts[question] += 1
            attempt = server.attempts[question]
            server.headers.append(self.headers)
        self.counted = True
        try:
            time.sleep(server.delay * (1 + sum(question.encode()) % 3))
            fault, answer = server.fate(question)
            if fault and (attempt == 1 or fault.startswith("always ")):
                self.fail(fault.removeprefix("always "))
            else:
                self.answer(answer)
                with server.lock:
                    server.paid.append(question)
        finally:
            self.done()

    def done(self) -> None:
        """No longer at work: said before the last byte goes out, for then the client goes on."""
        with self.server.lock:
            self.server.active -= self.counted
        self.counted = False

    def send(self, status, text, kind="application/json", more=(), cut=0, drip=False) -> None:
        data = text.encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(data)}"]
        head = "\r\n".join([*lines, *more, "", ""]).encode()
        if drip:
            for i in range(0, len(data) - 1, 40):
                self.wfile.write((head if i == 0 else b"") + data[i : min(i + 40, len(data) - 1)])
                time.sleep(0.002)
            head, data = b"", data[-1:]
        self.done()
        self.wfile.write(head + data[: len(data) - cut])
        if cut:
            self.close_connection = True

    def fail(self, fault: str) -> None:
        if fault == "drop":
            self.close_connection = True
        elif fault == "cut body":
            self.send(200, completion("Preferred: A"), cut=20)
        elif fault == "rate limit":
            self.send(429, error("slow down"), more=["Retry-After: 0.05"])
        elif fault == "server error":
            self.send(500, error("it broke"), more=["Retry-After-Ms: 20"])
        else:  # a status of its own, which echoes the key
            self.send(int(fault), error(f"not so, {self.headers['Authorization']}"))

    def answer(self, answer: str) -> None:
        text = ANSWERS.get(answer, answer)
        if answer == "no choices":
            self.send(200, json.dumps({"choices": [], "object": "chat.completion"}))
        elif answer == "nonsense":
            self.send(200, "<html>Welcome to the hotel's Wi-Fi</html>", kind="text/html")
        elif answer == "half JSON":
            self.send(200, completion("Preferred: A")[:-30])
        elif answer == "echo":
            self.send(200, completion(f"{self.headers['Authorization']}\nPreferred: A"))
        elif answer == "wrong type":
            self.send(200, completion(text), kind="text/plain")
        else:
            reason = "length" if answer == "long" else "stop"
            self.send(200, completion(text, reason), drip=answer == "drip")


def completion(text: str, reason: str = "stop") -> str:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]})


def error(text: str) -> str:
    return json.dumps({"error": {"message": text}})
