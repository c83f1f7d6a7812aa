"""What the nodes of a test tell each other: barriers and shared values, for vmctl."""
import asyncio


class Board:
    """One per run. A node is anything with an `id`, a `name` and `ended()`."""

    def __init__(self, nodes):
        self.nodes = nodes
        self.barriers, self.values, self.changed = {}, {}, asyncio.Event()

    def poke(self):
        self.changed.set()
        self.changed.clear()

    def others_gone(self, node, came):
        """Whether nobody can answer: every other node that has not come has ended its script."""
        return all(o.ended() for o in self.nodes if o is not node and o.id not in came)

    async def answer(self, node, verb, rest):
        """The answer to a command about the board, or None when it is about something else."""
        match verb:
            case "barrier":
                came = self.barriers.setdefault(rest[0], set())
                came.add(node.id)
                self.poke()
                while len(came) < len(self.nodes):
                    if self.others_gone(node, came):
                        return f"error no other node is left to come to {rest[0]}"
                    await self.changed.wait()
            case "set":
                self.values[rest[0]] = " ".join(rest[1:])
                self.poke()
            case "get":
                return f"ok {self.values.get(rest[0], '')}"
            case "wait":
                while rest[0] not in self.values:
                    if self.others_gone(node, ()):
                        return f"error no other node is left to set {rest[0]}"
                    await self.changed.wait()
                return f"ok {self.values[rest[0]]}"
            case _:
                return None
        return "ok"
