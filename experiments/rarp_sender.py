"""One announcement of a VM from here, whoever has it: python -m experiments.rarp_sender DEVICE MAC IP"""

import socket
import sys

from hosts.announce import frames

if __name__ == "__main__":
    device, mac, ip = sys.argv[1:4]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((device, 0))
        for frame in frames("rarp", mac, ip):
            sock.send(frame)
