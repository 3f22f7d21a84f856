"""none: the original layer itself. Asking for it puts the original module back."""

from qnb.errors import UnknownScheme
from qnb.schemes import register
from qnb.schemes.base import How, Inputs, Rounded, Scheme, Variant


@register
class Original(Scheme):
    name = "none"

    def variant(self, rounded: Rounded, how: How, inputs: Inputs) -> Variant:
        raise UnknownScheme("scheme 'none' is the original layer: it has no codes to pack")
