"""A disk that can be broken on command: what `--disk faulty:SIZE` gives a guest.

It has a volatile cache, as real disks do. When the power fails, of the writes since the last flush
some are there, some are not, and some are torn between their sectors of 512 bytes. Which ones is
drawn from a seed. Besides it can be told to fail, to hang or to be full (`vmctl disk`).

QEMU reaches it as a network block device (NBD, fixed newstyle) on a unix socket.
"""
import asyncio
import contextlib
import errno
import random
import struct

SECTOR = 512
MODES = ("ok", "fail", "fail-writes", "full", "hang")
OPTION_MAGIC, REPLY_MAGIC, REQUEST_MAGIC, ANSWER_MAGIC = 0x49484156454F5054, 0x3E889045565A9, 0x25609513, 0x67446698
OPT_ABORT, OPT_INFO, OPT_GO = 2, 6, 7
REP_ACK, REP_INFO, REP_UNSUPPORTED = 1, 3, 0x80000001
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
# has flags, flush, FUA, trim, write zeroes
ABILITIES = 1 | 4 | 8 | 32 | 64


class FaultyDisk:
    def __init__(self, name, size, seed):
        self.name, self.random = name, random.Random(f"{seed} {name}")
        self.current, self.durable = bytearray(size), bytearray(size)
        self.pending = []  # since the last flush, in order: (offset, data, is it durable for certain)
        self.mode, self.changed = "ok", asyncio.Event()
        self.server, self.clients = None, set()

    async def listen(self, path):
        self.server = await asyncio.start_unix_server(self.serve, path, limit=1 << 26)

    def set_mode(self, mode):
        if mode not in MODES:
            raise ValueError(f"{mode} is not one of {', '.join(MODES)}")
        self.mode = mode
        self.changed.set()
        self.changed = asyncio.Event()

    def flush(self):
        for offset, data, _ in self.pending:
            self.durable[offset:offset + len(data)] = data
        self.pending.clear()

    def power_failure(self):
        """What the cache still held is kept in part. Returns how many writes there were, and how many are whole."""
        style = self.random.choice(("none", "all", "mixed", "mixed"))
        whole = 0
        for offset, data, certain in self.pending:
            fate = {"none": "lost", "all": "kept"}.get(style) or self.random.choice(("lost", "kept", "kept", "torn"))
            if certain or fate == "kept":
                whole += 1
                self.durable[offset:offset + len(data)] = data
            elif fate == "torn":
                for at in range(0, len(data), SECTOR):
                    if self.random.random() < 0.5:
                        self.durable[offset + at:offset + at + SECTOR] = data[at:at + SECTOR]
        count = len(self.pending)
        self.pending.clear()
        self.current[:] = self.durable
        return count, whole

    async def serve(self, reader, writer):
        self.clients.add(writer)
        try:
            if await self.negotiate(reader, writer):
                await self.transmit(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the emulator was killed
        finally:
            self.clients.discard(writer)
            writer.close()

    async def negotiate(self, reader, writer):
        writer.write(struct.pack(">8sQH", b"NBDMAGIC", OPTION_MAGIC, 3))
        await reader.readexactly(4)
        while True:
            magic, option, length = struct.unpack(">QII", await reader.readexactly(16))
            assert magic == OPTION_MAGIC, "not an NBD client"
            await reader.readexactly(length)
            if option == OPT_ABORT:
                return False
            if option not in (OPT_GO, OPT_INFO):
                writer.write(struct.pack(">QIII", REPLY_MAGIC, option, REP_UNSUPPORTED, 0))
                continue
            export = struct.pack(">HQH", 0, len(self.current), ABILITIES)
            blocks = struct.pack(">HIII", 3, SECTOR, 4096, 1 << 25)
            for info in (export, blocks):
                writer.write(struct.pack(">QIII", REPLY_MAGIC, option, REP_INFO, len(info)) + info)
            writer.write(struct.pack(">QIII", REPLY_MAGIC, option, REP_ACK, 0))
            if option == OPT_GO:
                return True

    async def transmit(self, reader, writer):
        parked = set()
        while True:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", await reader.readexactly(28))
            assert magic == REQUEST_MAGIC, "not an NBD request"
            if kind == DISCONNECT:
                return
            data = await reader.readexactly(length) if kind == WRITE else b""
            request = (kind, flags, offset, length, data)
            if self.mode == "hang":
                task = asyncio.create_task(self.later(writer, cookie, request))
                parked.add(task)
                task.add_done_callback(parked.discard)
                continue
            self.answer(writer, cookie, request)
            await writer.drain()

    async def later(self, writer, cookie, request):
        while self.mode == "hang":
            await self.changed.wait()
        with contextlib.suppress(ConnectionError):
            self.answer(writer, cookie, request)

    def answer(self, writer, cookie, request):
        error, data = self.execute(*request)
        writer.write(struct.pack(">IIQ", ANSWER_MAGIC, error, cookie) + data)

    def execute(self, kind, flags, offset, length, data):
        if self.mode == "fail" or (self.mode == "fail-writes" and kind != READ):
            return errno.EIO, b""
        if self.mode == "full" and kind in (WRITE, ZEROES):
            return errno.ENOSPC, b""
        if offset + length > len(self.current):
            return errno.EINVAL, b""
        if kind == READ:
            return 0, bytes(self.current[offset:offset + length])
        if kind == FLUSH:
            self.flush()
        elif kind in (WRITE, ZEROES, TRIM):
            data = data if kind == WRITE else bytes(length)
            self.current[offset:offset + length] = data
            self.pending.append((offset, data, bool(flags & FUA)))
        else:
            return errno.EINVAL, b""
        return 0, b""
