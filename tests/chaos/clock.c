/* Moves a process's wall clock by as many seconds as the file BELFRY_CLOCK says, while it runs.
 * Loaded before the C library; the clocks that only go forward stay as they are. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *now)
{
    long failed = syscall(SYS_clock_gettime, id, now);
    const char *file = getenv("BELFRY_CLOCK");
    char text[32] = {0};
    int handle;
    if (failed || id != CLOCK_REALTIME || !file || (handle = open(file, O_RDONLY)) < 0)
        return failed ? -1 : 0;
    if (read(handle, text, sizeof text - 1) > 0)
        now->tv_sec += atol(text);
    close(handle);
    return 0;
}
