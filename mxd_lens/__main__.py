from mxd_lens.cli import main

main()
