"""A switch that several guests are connected to, wherever they are served.

It is in one process; a guest whose bus runs in another one has an endpoint there, which is
connected to it by a line. Switches of the same name of several servers can be one, too.

========= =================================================================================
`hub`     a switch with what it needs of the world; found by its name
`options` what a specification says of a port
`keeper`  the switch, and the lines of its guests
`meeting` how switches of the same name find each other
`carrier` frames between a port and a line, both ways
`line`    messages through a socket
`messages` what goes over a line
========= =================================================================================
"""
