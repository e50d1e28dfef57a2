"""Networks that run in another process: looked at, changed and stopped from beside.

A network with a name listens on a unix socket of its own while it runs; whoever is the same user, or root, may attach::

    net = vn.Net(name="lab")          # or: virtnet run lab.toml

    lab = vn.attach("lab")            # in another process; or: virtnet show lab
    print(lab.stats().balance())
    lab.apply(vn.Spec.read("lab.toml"))

The socket is ``$XDG_RUNTIME_DIR/virtnet/NAME.sock``, or ``/tmp/virtnet-UID/NAME.sock`` where there is no such
directory; a name with a slash is the socket's own path. What is said there is one request and one answer a connection,
each a line of JSON (:mod:`virtnet.remote.lines`).
"""

from __future__ import annotations

from virtnet.remote.attached import AttachedNet, attach
from virtnet.remote.captures import AttachedCapture, AttachedColumns
from virtnet.remote.place import networks

__all__ = ["AttachedCapture", "AttachedColumns", "AttachedNet", "attach", "networks"]
