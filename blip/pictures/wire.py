"""The messages between the pool and a decoding process; both ends close the connection on anything else."""

import struct

#: A request: the side of the square that the picture is resized to, whose resize it is, and how many bytes of its path
#: follow.
REQUEST = struct.Struct("!HBH")
RESIZES = ("lavis", "transformers")
#: An answer: its kind, and how many bytes follow.
ANSWER = struct.Struct("!BI")

READY = 0  # once, after the start
PIXELS = 1  # (S, S, 3) uint8, RGB
REFUSED = 2  # one sentence, UTF-8
LARGE = 3  # decoding needs the memory that follows as `NUMBER`: the process waits for GO
NUMBER = struct.Struct("!I")  # MiB
GO = b"\1"
