"""`fedlora site serve` with a known secret: `python seeded_site.py SEED POLICY`.

No policy allows privacy.seeded_noise, and none ever should. So that a deployed run can be compared with a simulated one
number by number, the daemon's root is given the bytes of the simulation's. Only tests do that, to records of no one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedlora.cli.site import serve
from fedlora.randomness import SecretRoot

if __name__ == "__main__":
    known = SecretRoot.seeded(int(sys.argv[1])).root
    SecretRoot.from_os = classmethod(lambda cls: cls(known))  # type: ignore[method-assign]
    serve(Path(sys.argv[2]))
