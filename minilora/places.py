"""Where the package's own data lies: `data/` of a checkout, and `minilora/data` where a wheel was installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "data" / "base").is_dir() else None
DATA = PACKAGE / "data" if CHECKOUT is None else CHECKOUT / "data"
MODELS = Path("models") if CHECKOUT is None else CHECKOUT / "models"  # what `get` fetches
