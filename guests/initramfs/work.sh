#!/bin/busybox sh
# Work for the processor, by name; each piece says on the console when it begins and when it ends.
# What it works on is made before, and lies in memory.
B=/bin/busybox
$B mount -t tmpfs tmpfs /tmp
$B dd if=/dev/zero of=/tmp/64M bs=1M count=64 2>/dev/null
# The program itself is what compresses and sorts as programs and texts do.
size=0
while [ $size -lt 17000000 ]; do
    $B cat $B >> /tmp/more
    size=$($B stat -c %s /tmp/more)
done
$B dd if=/tmp/more of=/tmp/16M bs=1M count=16 2>/dev/null
$B dd if=$B of=/tmp/1M bs=1k count=1000 2>/dev/null
$B rm /tmp/more

work() {
    case "$1" in
        md5) $B md5sum /tmp/64M ;;
        sha256) $B sha256sum /tmp/64M ;;
        gzip) $B gzip -c /tmp/16M | $B wc -c ;;
        awk) $B awk 'BEGIN { for (i = 0; i < 3000000; i++) s += i % 7; print s }' ;;
        shloop)
            i=0
            while [ $i -lt 200000 ]; do i=$((i + 1)); done
            echo $i ;;
        forkexec)
            i=0
            while [ $i -lt 500 ]; do
                $B true
                i=$((i + 1))
            done
            echo $i ;;
        syscall) $B dd if=/dev/zero of=/dev/null bs=1 count=150000 2>/dev/null; echo $? ;;
        sort) $B od -An -v -tx2 /tmp/1M | $B sort | $B md5sum ;;
        pair)
            $B sha256sum /tmp/64M > /tmp/first &
            $B sha256sum /tmp/64M > /tmp/second
            wait
            $B cat /tmp/first /tmp/second | $B md5sum ;;
        clock)
            # Often, since a busy host hears some of it late; once before a minute of sleep, once after it.
            for half in first second; do
                i=0
                while [ $i -lt 20 ]; do
                    read -r now rest < /proc/uptime
                    echo "dunlin-clock: $half $now" > /dev/console
                    $B usleep 100000
                    i=$((i + 1))
                done
                [ $half = first ] && $B sleep 60
            done ;;
        *) echo "unknown" ;;
    esac
}

for name in "$@"; do
    echo "dunlin-work: begin $name"
    result=$(work "$name")
    echo "dunlin-work: end $name $result"
done
