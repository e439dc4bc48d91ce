"""`python -m minidisagg`"""

from minidisagg.cli import main

main()
