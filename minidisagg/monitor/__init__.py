"""`minidisagg monitor`: a full-screen view of a running server. It speaks HTTP only and imports nothing of the engine.

state.py    what the events of the server add up to; a pure function of them
panels.py   the seven panels; pure as well
view.py     the screen: its layout, header, footer and what takes the panels' place
keys.py     what a key does
load.py     a load generator to look at
app.py      the terminal, the stream and the clock that tie them together
"""
