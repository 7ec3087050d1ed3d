/* An allocator that is declared only: compile.sh looks at which names an object asks for. */
#include <stddef.h>
void *my_malloc(size_t bytes, void *context);
void my_free(void *p, void *context);
