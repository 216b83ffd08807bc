#!/usr/bin/env python3
"""net_delay.py PORT MS: frames between a bridge's port and the bridge take MS longer, each way (netns.sh delay).

For kernels without netem. Runs in the bridge's namespace: takes PORT off the bridge, puts a tap in its place and carries
frames between the two. Prints "ready"; PORT is back on the bridge when it ends (SIGTERM).
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time

TUNSETIFF, IFF_TAP_NO_PI = 0x400454CA, 0x1002
FRAME_BYTES = 65600
SOL_PACKET, PACKET_IGNORE_OUTGOING = 263, 23


def main() -> int:
    port, delay = sys.argv[1], float(sys.argv[2]) / 1000
    bridge, tap = "br0", f"d{port}"
    tap_fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap_fd, TUNSETIFF, struct.pack("16sH", tap.encode(), IFF_TAP_NO_PI))
    frames = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    frames.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    frames.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    subprocess.run(["ip", "link", "set", port, "nomaster", "promisc", "on"], check=True)
    subprocess.run(["ip", "link", "set", tap, "master", bridge, "up"], check=True)
    frames.bind((port, 0))
    frames.setblocking(False)
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    # what came from one side and is due at the other
    ways = [
        (frames.fileno(), tap_fd, collections.deque[tuple[float, bytes]]()),
        (tap_fd, frames.fileno(), collections.deque[tuple[float, bytes]]()),
    ]
    print("ready", flush=True)
    while not ended:
        due = min((queue[0][0] for _, _, queue in ways if queue), default=time.monotonic() + 0.2)
        ready, _, _ = select.select([way[0] for way in ways], [], [], max(0.0, due - time.monotonic()))
        now = time.monotonic()
        for source, target, queue in ways:
            if source in ready:
                queue.append((now + delay, os.read(source, FRAME_BYTES)))
            while queue and queue[0][0] <= now:
                frame = queue.popleft()[1]
                try:
                    os.write(target, frame)
                except OSError:  # a full queue or a link that is down loses frames, as a network would
                    pass
    subprocess.run(["ip", "link", "set", port, "promisc", "off", "master", bridge], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
